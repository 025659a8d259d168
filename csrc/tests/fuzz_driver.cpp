// Fuzzing without libFuzzer: core_fuzz [INPUTS [SEED]] mutates a pool of inputs, the same ones for the
// same seed everywhere. An input that fails is left in fuzz-failure.bin; core_fuzz FILE runs it again.
#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

using Random = std::mt19937_64;
constexpr std::size_t kPool = 512, kLongest = 2048;

std::string current;

void keep_input(int signal) {
  if (std::FILE* file = std::fopen("fuzz-failure.bin", "wb")) {
    std::fwrite(current.data(), 1, current.size(), file);
    std::fclose(file);
  }
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

std::size_t below(Random& random, std::size_t limit) { return random() % limit; }

const char* const kTexts[] = {
    "She has 4 boxes of 6 pens, 4 * 6 = 24 pens.\nShe gives 5 away, 24 - 5 = 19.\n#### 19",
    "First 6 * 4 = 24. Then 24 - 5 = 19 pens are left.\nThe answer is 19.",
    "Step 1: $\\frac{48}{2} = 24$\nStep 2: 24 \\times 2 = 48\nso \\boxed{\\frac{1}{2}}",
    "1. Penguins are birds.\n2. Birds lay eggs.\n**Final Answer:** (B) yes",
    "so 48/2 = <<48/2=24>>24 clips; x = 594 / 3 = 198 \xE2\x89\x88 200 \xC2\xBD \xC3\x97 1,234.50",
    "two plus three equals 5. - seven minus -2 = 9% of $1,000 \xF0\x9F\x99\x82 \xE4\xBA\x8C",
};
const char* const kPieces[] = {
    "=", " + ", "-", "*", "/", "12", "3.5", "1,200", ".5", "007", "99999999999999", "\n", ". ", " ",
    "answer is ", "answer: ", "####", "\\boxed{", "}", "{", "\\frac{", "}{", "\\times", "<<", ">>",
    "Step 1:", "1. ", "(a) ", "- ", "Mr.", "apples ", "seven ", "equals ", "yes ", "x ", "**", ",",
    "\xC3\x97", "\xE2\x88\x92", "\xE2", "\xC2\xBD", "\xE2\x80\xA8", "\xFF", "\xFF", "'", "$", "%",
    "\\", "#", "_", ")", "]", ";", "?", ":", "1 = ", "2 = 2 = ",
};

std::string seed_input(Random& random) {
  std::string out;
  const std::size_t kind = below(random, 4);
  out.push_back(static_cast<char>(kind));
  for (int i = 0; i < 28; ++i) out.push_back(static_cast<char>(below(random, 256)));
  if (kind < 2) {
    const std::size_t texts = 1 + below(random, 6);
    for (std::size_t t = 0; t < texts; ++t) {
      if (t) out.push_back('\xFF');
      out += kTexts[below(random, std::size(kTexts))];
    }
  } else {
    const std::size_t size = below(random, 900);
    for (std::size_t i = 0; i < size; ++i) out.push_back(static_cast<char>(below(random, 256)));
  }
  return out;
}

void mutate(std::string& input, const std::string& other, Random& random) {
  const std::size_t at = below(random, input.size() + 1);
  const std::size_t length = std::min(below(random, 40), input.size() - at);
  switch (below(random, 7)) {
    case 0:
      if (at < input.size()) input[at] = static_cast<char>(below(random, 256));
      break;
    case 1:
      if (at < input.size()) input[at] = static_cast<char>(input[at] ^ 1 << below(random, 8));
      break;
    case 2: input.erase(at, length); break;
    case 3: input.insert(at, input.substr(at, length)); break;
    case 4: input.insert(at, kPieces[below(random, std::size(kPieces))]); break;
    case 5: input = input.substr(0, at) + other.substr(std::min(other.size(), at)); break;
    default: input.insert(at, 1, static_cast<char>(below(random, 256))); break;
  }
  if (input.size() > kLongest) input.resize(kLongest);
}

}  // namespace

int main(int argc, char** argv) {
  if (std::FILE* file = argc == 2 ? std::fopen(argv[1], "rb") : nullptr) {
    for (int c = std::fgetc(file); c != EOF; c = std::fgetc(file))
      current.push_back(static_cast<char>(c));
    std::fclose(file);
    return LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(current.data()),
                                  current.size());
  }
  const long inputs = argc > 1 ? std::atol(argv[1]) : 20'000;
  Random random(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
  std::signal(SIGABRT, keep_input);
  std::signal(SIGSEGV, keep_input);
  std::vector<std::string> pool;
  for (std::size_t i = 0; i < kPool; ++i) pool.push_back(seed_input(random));
  for (long done = 0; done < inputs; ++done) {
    current = pool[below(random, kPool)];
    const std::size_t changes = 1 + below(random, 6);
    for (std::size_t c = 0; c < changes; ++c) mutate(current, pool[below(random, kPool)], random);
    LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(current.data()), current.size());
    // most inputs live on, so that changes add up; some start anew
    pool[below(random, kPool)] = below(random, 16) ? current : seed_input(random);
  }
  std::printf("%ld inputs, nothing broke\n", inputs);
  return 0;
}
