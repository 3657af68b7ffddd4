// The errors that tqai throws. Every message says what was given, what is allowed and what to do.
#pragma once

#include <stdexcept>
#include <string>
#include <system_error>
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

/// More bytes than `limit_memory` allows; the message has the numbers. Python: `MemoryError`.
class TQAI_API MemoryLimitError : public Error {
 public:
  using Error::Error;
};

/// A file could not be opened, read or written; the message names it. Python: `OSError`.
class TQAI_API FileError : public Error {
 public:
  /// What happened to which file, and the system's reason.
  FileError(const std::string& what, std::error_code reason)
      : Error(what + ": " + reason.message()), code_(reason) {}
  /// The system's reason.
  const std::error_code& code() const noexcept { return code_; }

 private:
  std::error_code code_;
};

}  // namespace tqai
