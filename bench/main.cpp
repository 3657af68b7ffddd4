#include <benchmark/benchmark.h>

#include "bench.hpp"

int main(int argc, char** argv) {
  tqai::bench::register_all();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
