// Two files that include tqai, and agree.
#include <cstddef>
#include <cstdio>
#include <tqai/cpu.hpp>

std::size_t levels();

int main() {
  std::printf("%zu levels\n", levels());
  return levels() == tqai::available_levels().size() ? 0 : 1;
}
