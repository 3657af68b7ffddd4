// Calls of the C interface with arguments that are right, wrong, missing or out of range. Tensors
// lie in buffers that hold them: what a pointer's owner got wrong cannot be found by the library.
//
// An input is the settings of a cache, and the calls with their arguments, a byte or two each.
#include <tqai/c_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <span>
#include <utility>
#include <vector>

#include "small_caches.hpp"

namespace {

class Choices {
 public:
  Choices(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}
  bool empty() const { return size_ == 0; }
  std::uint8_t next() {
    if (size_ == 0) return 0;
    --size_;
    return *data_++;
  }
  // Mostly the likely one; else something small, negative or far beyond.
  std::int64_t number(std::int64_t likely) {
    const std::uint8_t choice = next();
    if (choice < 200) return likely;
    constexpr std::int64_t kFar[] = {-1, 0, 1, 1 << 30, INT64_MAX, INT64_MIN};
    if (choice < 206) return kFar[choice - 200];
    return next();
  }
  std::int32_t setting(std::int32_t likely) { return static_cast<std::int32_t>(number(likely)); }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
};

bool is_ok(tqai_status status) {
  if (status == TQAI_OK) return true;
  if (status == TQAI_INTERNAL_ERROR || status < 0 || status > TQAI_INTERNAL_ERROR) std::abort();
  if (tqai_last_error() == nullptr || std::strlen(tqai_last_error()) == 0) std::abort();
  return false;
}

constexpr std::size_t kElements = std::size_t{1} << 14;
// Tokens of all sequences and heads that an input may append, those of trellis codes counting
// several times: it is their coding that takes time, and an input with much of it takes the place
// of many.
constexpr std::int64_t kMostTokens = 2400;
constexpr std::int64_t kTrellisTimes = 12;

// A tensor within kElements floats, mostly of the shape that is right.
template <typename Tensor, typename Pointer>
Tensor tensor(Choices& choices, Pointer data, std::int32_t dtype, const std::int64_t (&right)[4]) {
  Tensor tensor{};
  tensor.data = choices.next() == 255 ? nullptr : data;
  tensor.dtype = choices.setting(dtype);
  std::int64_t reach = 1;
  for (int axis = 4; axis-- > 0;) {
    tensor.shape[axis] = choices.number(right[axis]);
    tensor.strides[axis] = reach;
    if (tensor.shape[axis] > 0) {
      // Sizes of many turns would take for ever, wherever they lie.
      tensor.shape[axis] = std::min<std::int64_t>(tensor.shape[axis], 1000);
      reach *= tensor.shape[axis];
    }
    if (reach > static_cast<std::int64_t>(kElements)) {
      reach = 1;
      tensor.shape[axis] = 0;
    }
  }
  return tensor;
}

class Calls {
 public:
  explicit Calls(Choices choices) : choices_(choices) {}
  ~Calls() { tqai_cache_destroy(cache_); }
  Calls(const Calls&) = delete;
  Calls& operator=(const Calls&) = delete;

  void run() {
    create();
    while (cache_ != nullptr && !choices_.empty() && spent_ < kMostTokens) call();
  }

 private:
  void create() {
    tqai_cache_options options;
    tqai_cache_options_init(&options, sizeof(options));
    const float frequencies[] = {1.0F, 0.1F, 0.01F, 0.001F};
    const std::uint8_t sections[] = {0, 1, 2, 1};
    options.batch = std::min(choices_.setting(1 + choices_.next() % 3), 4);
    options.kv_heads = std::min(choices_.setting(1 + choices_.next() % 2), 4);
    options.head_dim = choices_.setting(8);
    if (options.head_dim > 64) options.head_dim = 8;
    options.value_head_dim = choices_.setting(8);
    if (options.value_head_dim > 64) options.value_head_dim = 0;
    options.dtype = choices_.setting(choices_.next() % 3);
    options.bits_k = choices_.setting(1 + choices_.next() % 8);
    options.bits_v = choices_.setting(1 + choices_.next() % 8);
    options.sink_tokens = choices_.setting(2);
    options.residual_window = choices_.setting(4);
    options.rotation = choices_.setting(0);
    options.centering = choices_.setting(choices_.next() % 4);
    if (choices_.next() % 2 == 0) {
      options.rotary_dim = std::min(choices_.setting(8), 8);
      options.rope_layout = choices_.setting(0);
      options.inv_freq = frequencies;
      options.sections = choices_.next() % 2 == 0 ? sections : nullptr;
    }
    options.seed = choices_.next();
    // Of many coordinates it takes longer than all calls.
    const bool in_basis = choices_.next() % 8 == 0 && options.head_dim <= 16;
    tqai_key_basis* basis = in_basis ? learnt(options) : nullptr;
    options.key_basis = basis;
    options.value_codes = choices_.setting(choices_.next() % 4 == 0 ? 1 : 0);
    options.key_codes = choices_.setting(basis == nullptr ? 0 : choices_.next() % 2);
    if (is_ok(tqai_cache_create(&options, &cache_)) != (cache_ != nullptr)) std::abort();
    tqai_key_basis_destroy(basis);
    times_ = options.value_codes != 0 || options.key_codes != 0 ? kTrellisTimes : 1;
  }

  // Of two keys and queries a head, which mostly fits the options.
  tqai_key_basis* learnt(const tqai_cache_options& options) {
    tqai_key_moments* moments = nullptr;
    tqai_key_basis* basis = nullptr;
    if (!is_ok(tqai_key_moments_create(&options, &moments))) return nullptr;
    for (std::int32_t head = 0; head < options.kv_heads; ++head) {
      const std::size_t count = choices_.next() < 250 ? 2 : 0;
      is_ok(tqai_key_moments_add_keys(moments, head, kinds_.data(), 2, nullptr, 0));
      is_ok(tqai_key_moments_add_queries(moments, head, kinds_.data() + 64, count, nullptr, 0));
    }
    const std::int32_t bits = choices_.setting(options.bits_k);
    if (is_ok(tqai_key_basis_learn(moments, bits, choices_.number(64), &basis)) !=
        (basis != nullptr)) {
      std::abort();
    }
    tqai_key_moments_destroy(moments);
    return basis;
  }

  // As many of these tokens as may still be appended, or one.
  std::int64_t spend(const tqai_cache_info& now, std::int64_t tokens) {
    const std::int64_t each = times_ * std::max(now.batch * now.kv_heads, 1);
    tokens = std::clamp<std::int64_t>(tokens, 0,
                                      std::max<std::int64_t>((kMostTokens - spent_) / each, 1));
    spent_ += each * tokens;
    return tokens;
  }

  tqai_cache_info info() {
    tqai_cache_info info;
    tqai_cache_info_init(&info, sizeof(info));
    if (!is_ok(tqai_cache_get_info(cache_, &info))) std::abort();
    return info;
  }

  void call() {
    const tqai_cache_info now = info();
    switch (choices_.next() % 17) {
      case 0:
      case 1: append(now); break;
      case 2: {
        std::int64_t held = 0;
        is_ok(tqai_cache_seal(cache_, choices_.next() % 2 == 0 ? &held : nullptr));
        break;
      }
      case 3: attend(now); break;
      case 4: {
        const std::int64_t tokens = std::min<std::int64_t>(now.tokens, 100);
        const auto keys = tensor<tqai_output>(choices_, room_.data(), TQAI_F32,
                                              {now.batch, now.kv_heads, tokens, now.head_dim});
        const auto values =
            tensor<tqai_output>(choices_, more_room_.data(), TQAI_F32,
                                {now.batch, now.kv_heads, tokens, now.value_head_dim});
        is_ok(tqai_cache_gather(cache_, choices_.number(now.tokens - tokens), &keys, &values));
        break;
      }
      case 5: is_ok(tqai_cache_crop(cache_, choices_.number(now.tokens / 2))); break;
      case 6: {
        const std::int64_t rows[] = {choices_.number(0), choices_.number(now.batch - 1),
                                     choices_.number(0)};
        is_ok(tqai_cache_select(cache_, choices_.next() == 255 ? nullptr : rows,
                                choices_.next() % 4));
        break;
      }
      case 7: {
        const std::int64_t counts[] = {choices_.number(1), choices_.number(2), choices_.number(0),
                                       choices_.number(3)};
        const auto batch = static_cast<std::size_t>(now.batch);
        is_ok(tqai_cache_set_padding(cache_, counts, choices_.next() < 250 ? batch : 4));
        break;
      }
      case 8: is_ok(tqai_cache_discard_before(cache_, choices_.number(now.tokens / 3))); break;
      case 9: {
        tqai_cache* copy = nullptr;
        if (!is_ok(tqai_cache_copy(cache_, &copy))) std::abort();
        std::swap(copy, cache_);
        tqai_cache_destroy(copy);
        break;
      }
      case 10: through_bytes(); break;
      case 11: {
        std::uint8_t hidden[4 * 90] = {};
        const auto batch = static_cast<std::size_t>(now.batch);
        const std::size_t count = batch * (choices_.next() % 90);
        for (std::size_t i = 0; i < count; i += 1 + choices_.next() % 8) hidden[i] = 1;
        is_ok(tqai_cache_leave_out(cache_, hidden, choices_.next() < 250 ? count : 4));
        tqai_token_span spans[3];
        std::size_t left_out = 0;
        is_ok(tqai_cache_left_out(cache_, choices_.setting(0), spans, choices_.next() % 4,
                                  &left_out));
        break;
      }
      case 12: views(now); break;
      case 13:
        is_ok(tqai_cache_reserve(cache_, std::min<std::int64_t>(choices_.number(90), 4096)));
        break;
      case 14:
      case 15: together(now); break;
      default: {
        tqai_memory memory;
        tqai_memory_init(&memory, sizeof(memory));
        if (!is_ok(tqai_cache_get_memory(cache_, &memory))) std::abort();
        std::int64_t packed = 0;
        is_ok(tqai_cache_packed_tokens(cache_, choices_.setting(0), &packed));
        break;
      }
    }
  }

  tqai_tensor sides(const tqai_cache_info& now, std::int64_t batch, std::int64_t count,
                    std::int32_t dim) {
    return tensor<tqai_tensor>(choices_, numbers_.data(), now.dtype,
                               {batch, now.kv_heads, count, dim});
  }

  // Of `count` tokens; `numbers` holds them.
  tqai_positions positions(std::int64_t count, std::vector<std::int64_t>& numbers) {
    for (std::int64_t i = 0; i < 3 * count; ++i) numbers.push_back(i % count * (i % 2));
    numbers[0] = choices_.number(0);
    return {numbers.data(), {1, choices_.next() % 4, count}, {0, count, 1}};
  }

  void append(const tqai_cache_info& now) {
    const std::int64_t count = spend(now, 1 + choices_.next() % 90);
    const tqai_tensor keys = sides(now, now.batch, count, now.head_dim);
    const tqai_tensor values = sides(now, now.batch, count, now.value_head_dim);
    std::vector<std::int64_t> numbers;
    const tqai_positions stand = positions(count, numbers);
    const bool given = choices_.next() % 2 == 0;
    is_ok(tqai_cache_append(cache_, &keys, &values, given ? &stand : nullptr));
  }

  tqai_attend_options attend_options() {
    tqai_attend_options options;
    tqai_attend_options_init(&options, sizeof(options));
    options.first_token = choices_.number(0);
    options.window = choices_.number(0);
    options.causal = choices_.next() % 2;
    options.soft_cap = choices_.next() % 4 == 0 ? 30.0F : 0.0F;
    return options;
  }

  void attend(const tqai_cache_info& now) {
    const std::int64_t count = 1 + choices_.next() % 3;
    const std::int64_t heads = now.kv_heads * std::int64_t{1 + choices_.next() % 2};
    const auto queries = tensor<tqai_tensor>(choices_, numbers_.data(), TQAI_F32,
                                             {now.batch, heads, count, now.head_dim});
    const auto output = tensor<tqai_output>(choices_, room_.data(), TQAI_F32,
                                            {now.batch, count, heads, now.value_head_dim});
    tqai_attend_options options = attend_options();
    const auto mask = tensor<tqai_tensor>(
        choices_, numbers_.data(), TQAI_F32,
        {1, 1, count, std::max<std::int64_t>(now.tokens - options.first_token % 1000, 0)});
    if (choices_.next() % 3 == 0) options.mask = &mask;
    is_ok(tqai_cache_attend(cache_, &queries, &output, choices_.next() < 250 ? &options : nullptr));
  }

  // Each byte that the views show is read.
  void views(const tqai_cache_info& now) {
    tqai_block blocks[3];
    for (tqai_block& block : blocks) tqai_block_init(&block, sizeof(block));
    std::size_t count = 0;
    const std::int32_t row = choices_.setting(0);
    const std::size_t capacity = choices_.next() % 4;
    if (!is_ok(tqai_cache_sealed_blocks(cache_, row, blocks, capacity, &count))) return;
    std::size_t sum = 0;
    for (std::size_t b = 0; b < std::min(count, capacity); ++b) {
      const tqai_block& block = blocks[b];
      const auto* tiles = static_cast<const std::uint8_t*>(block.tiles);
      const std::size_t bytes = block.tile_bytes * static_cast<std::size_t>(now.kv_heads);
      for (std::size_t i = 0; i < bytes; ++i) sum += tiles[i];
      for (std::int32_t i = 0; block.positions != nullptr && i < block.sections * 64; ++i) {
        sum += static_cast<std::size_t>(block.positions[i]);
      }
      tqai_centre centre;
      tqai_centre_init(&centre, sizeof(centre));
      if (!is_ok(tqai_cache_centre(cache_, row, choices_.setting(block.centre_set),
                                   choices_.setting(0), &centre))) {
        continue;
      }
      for (std::int32_t i = 0; i < now.head_dim; ++i) sum += centre.constant[i] != 0.0F;
      for (std::int32_t i = 0; centre.real != nullptr && i < centre.pairs; ++i) {
        sum += centre.real[i] != centre.imaginary[i];
      }
    }
    room_[0] = static_cast<float>(sum);
  }

  // Calls on this cache and a copy, mostly.
  void together(const tqai_cache_info& now) {
    tqai_cache* other = nullptr;
    if (!is_ok(tqai_cache_copy(cache_, &other))) std::abort();
    const std::uint8_t choice = choices_.next();
    tqai_cache* caches[] = {cache_, choice < 250 ? other : choice == 255 ? nullptr : cache_};
    const std::size_t count = choices_.next() < 250 ? 2 : choices_.next() % 3;
    const std::int64_t likely = spend(now, choices_.next() % 90);
    const std::int64_t tokens[] = {choices_.number(likely), choices_.number(3)};
    const bool packed = now.batch == 1 && choices_.next() % 2 == 0;
    switch (choices_.next() % 4) {
      case 0: append_together(now, caches, count, tokens, packed); break;
      case 1: {
        std::int64_t held = 0;
        is_ok(tqai_caches_seal(caches, count, &held, nullptr));
        break;
      }
      case 2: is_ok(tqai_caches_crop(caches, count, tokens)); break;
      default: attend_together(now, caches, count, packed); break;
    }
    if (choices_.next() % 2 == 0) std::swap(other, cache_);
    tqai_cache_destroy(other);
  }

  void append_together(const tqai_cache_info& now, tqai_cache* const* caches, std::size_t count,
                       const std::int64_t (&tokens)[2], bool packed) {
    std::vector<std::int64_t> numbers;
    if (packed) {
      const std::int64_t sum = std::clamp<std::int64_t>(tokens[0], 0, 100) + 3;
      const tqai_tensor keys = sides(now, 1, sum, now.head_dim);
      const tqai_tensor values = sides(now, 1, sum, now.value_head_dim);
      const tqai_positions stand = positions(sum, numbers);
      is_ok(tqai_caches_append_packed(caches, count, tokens, &keys, &values,
                                      choices_.next() % 2 == 0 ? &stand : nullptr, nullptr));
      return;
    }
    tqai_tensor keys[2];
    tqai_tensor values[2];
    for (int i = 0; i < 2; ++i) {
      const std::int64_t own = std::clamp<std::int64_t>(tokens[i], 0, 100);
      keys[i] = sides(now, now.batch, own, now.head_dim);
      values[i] = sides(now, now.batch, own, now.value_head_dim);
    }
    is_ok(tqai_caches_append(caches, count, keys, values, nullptr, nullptr));
  }

  void attend_together(const tqai_cache_info& now, tqai_cache* const* caches, std::size_t count,
                       bool packed) {
    const std::int64_t tokens[] = {1 + choices_.next() % 2, choices_.number(1)};
    const tqai_attend_options options = attend_options();
    if (packed) {
      const std::int64_t sum = tokens[0] + std::clamp<std::int64_t>(tokens[1], 0, 9);
      const auto queries = tensor<tqai_tensor>(choices_, numbers_.data(), TQAI_F32,
                                               {1, now.kv_heads, sum, now.head_dim});
      const auto output = tensor<tqai_output>(choices_, room_.data(), TQAI_F32,
                                              {1, sum, now.kv_heads, now.value_head_dim});
      is_ok(tqai_caches_attend_packed(caches, count, tokens, &queries, &output, &options));
      return;
    }
    tqai_tensor queries[2];
    tqai_output outputs[2];
    const tqai_attend_options* each[] = {&options, nullptr};
    for (int i = 0; i < 2; ++i) {
      queries[i] = tensor<tqai_tensor>(choices_, numbers_.data(), TQAI_F32,
                                       {now.batch, now.kv_heads, 1, now.head_dim});
      outputs[i] = tensor<tqai_output>(choices_, i == 0 ? room_.data() : more_room_.data(),
                                       TQAI_F32, {now.batch, 1, now.kv_heads, now.value_head_dim});
    }
    is_ok(tqai_caches_attend(caches, count, queries, outputs,
                             choices_.next() % 2 == 0 ? each : nullptr, nullptr));
  }

  void through_bytes() {
    std::size_t size = 0;
    if (!is_ok(tqai_cache_serialized_bytes(cache_, &size))) std::abort();
    std::vector<std::uint8_t> bytes(size);
    if (is_ok(tqai_cache_serialize(cache_, bytes.data(), size - 1))) std::abort();
    if (!is_ok(tqai_cache_serialize(cache_, bytes.data(), size))) std::abort();
    if (choices_.next() % 4 == 0) {
      bytes[choices_.next() * size / 256] ^= static_cast<std::uint8_t>(1U << choices_.next() % 8);
    }
    if (tqai::fuzz::takes_long(std::as_bytes(std::span(bytes)))) return;
    tqai_cache* back = nullptr;
    if (!is_ok(tqai_cache_deserialize(bytes.data(), size, nullptr, &back))) return;
    std::swap(back, cache_);
    tqai_cache_destroy(back);
  }

  Choices choices_;
  // Shared by all inputs: to make them takes longer than most calls.
  inline static const std::vector<float> numbers_ = std::vector<float>(kElements, 0.5F);
  inline static const std::vector<float> kinds_ = [] {
    std::vector<float> kinds;
    for (int i = 0; i < 256; ++i) kinds.push_back(static_cast<float>(i * i % 17) - 8.0F);
    return kinds;
  }();
  inline static std::vector<float> room_ = std::vector<float>(kElements);
  inline static std::vector<float> more_room_ = std::vector<float>(kElements);
  tqai_cache* cache_ = nullptr;
  std::int64_t spent_ = 0;
  std::int64_t times_ = 1;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Calls(Choices(data, std::min<std::size_t>(size, 300))).run();
  return 0;
}
