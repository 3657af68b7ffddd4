// What the benchmark programs share: main.cpp runs what each registers.
#pragma once

namespace tqai::bench {

void register_all();

}  // namespace tqai::bench
