// The threads of the process that has loaded us, where it has some by OpenMP (torch does).
//
// Work between two of torch's products belongs on torch's own threads: they wait for it by spinning,
// and a second pool would have to share the cores with them.
#pragma once

namespace compact {

// Calls work(data, part, parts) for every part of at most `threads`; in one part where there are none.
void on_host_threads(int threads, void (*work)(void* data, int part, int parts), void* data);

}  // namespace compact
