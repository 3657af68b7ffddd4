// The errors that tqai throws. Every message says what was given, what is allowed and what to do.
#pragma once

#include <stdexcept>
#include <tqai/export.hpp>

namespace tqai {

/// Base of every error thrown by tqai; `std::bad_alloc` passes through as it is.
class TQAI_API Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// An argument's value, shape or type is not allowed. Python: `ValueError`.
class TQAI_API ValueError : public Error {
 public:
  using Error::Error;
};

/// A batch row, head or token that does not exist. Python: `IndexError`.
class TQAI_API IndexError : public Error {
 public:
  using Error::Error;
};

/// A legal request that this build or processor cannot serve. Python: `NotImplementedError`.
class TQAI_API UnsupportedError : public Error {
 public:
  using Error::Error;
};

}  // namespace tqai
