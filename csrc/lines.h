// Marks that carry no content: bullets, enumerations and "Step 3:" at the start of a line, calculator
// notes inside it.
#pragma once

#include <cstddef>
#include <string_view>

namespace compact {

// Past indentation, bullets, quote and heading marks at the start of a line, and past "3.", "(a)" or
// "Step 3:" behind them.
std::size_t skip_line_start(std::string_view text, std::size_t at);

// Does "<<" at `at` open a calculator note, "<<" [^<>\n]{0,200} ">>"? Then `end` is behind it.
bool is_note(std::string_view text, std::size_t at, std::size_t& end);

}  // namespace compact
