// All of tqai, the views of Eigen included; programs without Eigen include what they use.
#pragma once

#include <tqai/cache.hpp>
#include <tqai/codebook.hpp>
#include <tqai/cpu.hpp>
#include <tqai/eigen.hpp>
#include <tqai/error.hpp>
#include <tqai/files.hpp>
#include <tqai/half.hpp>
#include <tqai/key_basis.hpp>
#include <tqai/limits.hpp>
#include <tqai/packing.hpp>
#include <tqai/quantizer.hpp>
#include <tqai/resources.hpp>
#include <tqai/rotation.hpp>
#include <tqai/sequences.hpp>
#include <tqai/trellis.hpp>
