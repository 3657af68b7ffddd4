// All of tqai.
#pragma once

#include <tqai/cache.hpp>
#include <tqai/codebook.hpp>
#include <tqai/cpu.hpp>
#include <tqai/error.hpp>
#include <tqai/half.hpp>
#include <tqai/limits.hpp>
#include <tqai/packing.hpp>
#include <tqai/quantizer.hpp>
#include <tqai/rotation.hpp>
