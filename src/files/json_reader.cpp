#include "json_reader.hpp"

#include <limits>
#include <set>
#include <tqai/error.hpp>

namespace tqai::detail {
namespace TQAI_LOCAL {

TQAI_INLINE bool is_digit(char c) { return c >= '0' && c <= '9'; }

TQAI_INLINE void put_utf8(std::uint32_t point, std::string& to) {
  const auto put = [&to](std::uint32_t byte) { to += static_cast<char>(byte); };
  if (point < 0x80) {
    put(point);
  } else if (point < 0x800) {
    put(0xC0 | point >> 6);
    put(0x80 | (point & 0x3F));
  } else if (point < 0x1'0000) {
    put(0xE0 | point >> 12);
    put(0x80 | (point >> 6 & 0x3F));
    put(0x80 | (point & 0x3F));
  } else {
    put(0xF0 | point >> 18);
    put(0x80 | (point >> 12 & 0x3F));
    put(0x80 | (point >> 6 & 0x3F));
    put(0x80 | (point & 0x3F));
  }
}

}  // namespace TQAI_LOCAL

TQAI_INLINE void JsonReader::fail(const std::string& what) const {
  throw ValueError("not JSON: " + what + " at byte " + std::to_string(at_));
}

TQAI_INLINE void JsonReader::white_space() noexcept {
  while (at_ < text_.size()) {
    const char c = text_[at_];
    if (c != ' ' && c != '\n' && c != '\t' && c != '\r') return;
    ++at_;
  }
}

TQAI_INLINE bool JsonReader::take(char wanted) noexcept {
  white_space();
  if (at_ == text_.size() || text_[at_] != wanted) return false;
  ++at_;
  return true;
}

TQAI_INLINE void JsonReader::expect(char wanted) {
  if (take(wanted)) return;
  fail(std::string("no ") + wanted);
}

TQAI_INLINE char JsonReader::next() {
  if (at_ == text_.size()) fail("it ends too early");
  return text_[at_++];
}

TQAI_INLINE void JsonReader::enter() {
  if (++depth_ > kMostDepth) fail("too many levels");
}

TQAI_INLINE void JsonReader::object(const std::function<void(const std::string& key)>& each) {
  expect('{');
  enter();
  std::set<std::string> seen;
  if (!take('}')) {
    do {
      const std::string key = string();
      if (!seen.insert(key).second) fail("a key that was there before");
      expect(':');
      each(key);
    } while (take(','));
    expect('}');
  }
  leave();
}

TQAI_INLINE void JsonReader::array(const std::function<void()>& each) {
  expect('[');
  enter();
  if (!take(']')) {
    do {
      each();
    } while (take(','));
    expect(']');
  }
  leave();
}

TQAI_INLINE std::string JsonReader::string() {
  expect('"');
  std::string text;
  for (char c = next(); c != '"'; c = next()) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20) fail("a control character in a string");
    if (c == '\\') {
      escape(text);
    } else if (byte < 0x80) {
      text += c;
    } else {
      utf8(byte, text);
    }
  }
  return text;
}

TQAI_INLINE std::uint32_t JsonReader::hex() {
  std::uint32_t value = 0;
  for (int i = 0; i < 4; ++i) {
    const char c = next();
    const int digit = is_digit(c)              ? c - '0'
                      : (c >= 'a' && c <= 'f') ? c - 'a' + 10
                      : (c >= 'A' && c <= 'F') ? c - 'A' + 10
                                               : -1;
    if (digit < 0) fail("no hexadecimal digit");
    value = value << 4 | static_cast<std::uint32_t>(digit);
  }
  return value;
}

TQAI_INLINE void JsonReader::escape(std::string& to) {
  const char c = next();
  switch (c) {
    case '"':
    case '\\':
    case '/': to += c; return;
    case 'b': to += '\b'; return;
    case 'f': to += '\f'; return;
    case 'n': to += '\n'; return;
    case 'r': to += '\r'; return;
    case 't': to += '\t'; return;
    case 'u': break;
    default: fail("an unknown escape");
  }
  std::uint32_t point = hex();
  if (point >= 0xDC00 && point < 0xE000) fail("half of a surrogate pair");
  if (point >= 0xD800 && point < 0xDC00) {
    if (next() != '\\' || next() != 'u') fail("half of a surrogate pair");
    const std::uint32_t low = hex();
    if (low < 0xDC00 || low >= 0xE000) fail("half of a surrogate pair");
    point = 0x1'0000 + ((point - 0xD800) << 10) + (low - 0xDC00);
  }
  put_utf8(point, to);
}

TQAI_INLINE void JsonReader::utf8(unsigned char first, std::string& to) {
  const int more = first >= 0xF0 ? 3 : first >= 0xE0 ? 2 : 1;
  if (first < 0xC2 || first > 0xF4) fail("no UTF-8");
  std::uint32_t point = first & (0x3FU >> more);
  for (int i = 0; i < more; ++i) {
    const auto byte = static_cast<unsigned char>(next());
    if ((byte & 0xC0U) != 0x80) fail("no UTF-8");
    point = point << 6 | (byte & 0x3FU);
  }
  constexpr std::uint32_t kLeast[] = {0x80, 0x800, 0x1'0000};
  if (point < kLeast[more - 1] || point > 0x10'FFFF || (point >= 0xD800 && point < 0xE000)) {
    fail("no UTF-8");
  }
  put_utf8(point, to);
}

TQAI_INLINE std::int64_t JsonReader::count() {
  white_space();
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  const std::size_t start = at_;
  std::int64_t value = 0;
  for (; at_ < text_.size() && is_digit(text_[at_]); ++at_) {
    const std::int64_t digit = text_[at_] - '0';
    if (value > (kMost - digit) / 10) fail("a number that is too large");
    value = 10 * value + digit;
  }
  if (at_ == start || (at_ - start > 1 && text_[start] == '0')) fail("no whole number");
  if (at_ < text_.size() && (text_[at_] == '.' || text_[at_] == 'e' || text_[at_] == 'E')) {
    fail("no whole number");
  }
  return value;
}

TQAI_INLINE void JsonReader::number() {
  const auto digits = [this] {
    if (at_ == text_.size() || !is_digit(text_[at_])) fail("no number");
    while (at_ < text_.size() && is_digit(text_[at_])) ++at_;
  };
  const auto is = [this](char c) { return at_ < text_.size() && text_[at_] == c; };
  if (is('-')) ++at_;
  const std::size_t start = at_;
  digits();
  if (at_ - start > 1 && text_[start] == '0') fail("a number that begins with 0");
  if (is('.')) {
    ++at_;
    digits();
  }
  if (is('e') || is('E')) {
    ++at_;
    if (is('+') || is('-')) ++at_;
    digits();
  }
}

TQAI_INLINE void JsonReader::word(std::string_view word) {
  if (text_.substr(at_, word.size()) != word) fail("no value");
  at_ += word.size();
}

TQAI_INLINE void JsonReader::skip() {
  white_space();
  if (at_ == text_.size()) fail("it ends too early");
  switch (text_[at_]) {
    case '{': object([this](const std::string&) { skip(); }); return;
    case '[': array([this] { skip(); }); return;
    case '"': (void)string(); return;
    case 't': word("true"); return;
    case 'f': word("false"); return;
    case 'n': word("null"); return;
    default: number(); return;
  }
}

TQAI_INLINE void JsonReader::end() {
  white_space();
  if (at_ != text_.size()) fail("more than one value");
}

TQAI_INLINE std::string json_string(std::string_view text) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string quoted = "\"";
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      quoted += '\\';
      quoted += c;
    } else if (byte < 0x20) {
      quoted += "\\u00";
      quoted += kDigits[byte >> 4];
      quoted += kDigits[byte & 0xF];
    } else {
      quoted += c;
    }
  }
  return quoted + '"';
}

}  // namespace tqai::detail
