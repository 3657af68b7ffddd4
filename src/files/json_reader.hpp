// JSON, read strictly (RFC 8259) and within limits: headers come from files, which anybody can have
// written. It makes no tree of values, so that no text takes much more memory than it is long, and
// none more stack than kMostDepth levels. Own code, so that the library needs no other at run time
// or to be built: what headers hold are names, numbers and lists of them.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

namespace tqai::detail {

/// Each member reads one value, and throws ValueError where another comes, or none.
class JsonReader {
 public:
  static constexpr int kMostDepth = 64;

  /// `text` must outlive this.
  explicit JsonReader(std::string_view text) : text_(text) {}

  /// Calls `each` with every key, which must read the value. Throws for a key that comes twice.
  void object(const std::function<void(const std::string& key)>& each);
  /// Calls `each` where a value comes, which it must read.
  void array(const std::function<void()>& each);
  /// In UTF-8.
  std::string string();
  /// A whole number from 0 to 2^63 − 1.
  std::int64_t count();
  /// Whatever it is.
  void skip();
  /// Throws where anything but white space follows.
  void end();

 private:
  [[noreturn]] void fail(const std::string& what) const;
  void white_space() noexcept;
  bool take(char wanted) noexcept;
  void expect(char wanted);
  char next();
  void enter();
  void leave() noexcept { --depth_; }
  std::uint32_t hex();
  void escape(std::string& to);
  void utf8(unsigned char first, std::string& to);
  void number();
  void word(std::string_view word);

  std::string_view text_;
  std::size_t at_ = 0;
  int depth_ = 0;
};

/// `text`, which is UTF-8, between quotation marks.
std::string json_string(std::string_view text);

}  // namespace tqai::detail
