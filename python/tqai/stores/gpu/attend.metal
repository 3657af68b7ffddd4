// Softmax attention over sealed tiles (include/tqai/packing.hpp), in the Metal Shading Language, of
// which version 2.3 is enough: a dialect of C++14. CUDA compiles it too, with metal_stdlib.cuh.
//
// `Attend` and `merge` are two steps, as in flash-decoding; `Centres` comes before them where keys'
// centres turn. Each simdgroup of 32 threads goes through a few tiles with a
// softmax of its own, then `merge` makes one state of all of theirs. Queries come turned as the
// keys were, and sums of values leave in the domain that values were turned to.
//
// These are functions, as the frameworks pass arguments in different ways: each has kernels of a
// few lines around them (kernels.py). Arrays have no gaps. Types of most pointers are parameters,
// since mlx hands arrays of less than eight numbers out in another address space.
//
// No infinities are computed with, as "fast" mathematics knows none: a softmax that has seen
// nothing has the lowest finite number as its largest score, and 0 as its sum.
#include <metal_stdlib>

#if defined(__METAL_VERSION__)
#define TQAI_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__CUDACC__)
#define TQAI_UNROLL _Pragma("unroll")
#else
#define TQAI_UNROLL
#endif

namespace tqai {

constant constexpr int kTileTokens = 64;
constant constexpr int kBlock = 16;      // coordinates that are stored together
constant constexpr int kLineWords = 16;  // of 4 bytes: a line is 64 bytes
constant constexpr float kLowest = -3.402823466e+38f;
constant constexpr uint kMinusInfinity = 0xFF800000u;

// What `sizes` of Attend::run holds.
enum Size {
  kHeads,         // of keys and values
  kTiles,         // of each head
  kTokens,        // that count, at most 64 · kTiles
  kQueries,       // of each head: query heads that share it, times kSteps
  kSteps,         // queries of each query head
  kSplitTiles,    // tiles that one simdgroup goes through
  kSplits,        // how many simdgroups that makes
  kCentreTokens,  // scores that `centre` has for a query: one for each token, or 1 for all
  kBiasRow,       // from one to the next in `bias`, 0 where they share it; all five are 0, and
  kBiasHead,      // `bias` is not read, where there is none
  kBiasGroup,
  kBiasStep,
  kBiasToken,
  kSizes,
};

template <int Bits>
struct Width {
  // Codes of up to 8 bits in bytes: the same bits of each of a word's four.
  static constexpr uint mask(int bits) { return ((1u << bits) - 1u) * 0x01010101u; }

  // One lane of the eight lines of codes that share `Bits` lines of bytes, from `lines` on.
  static void unpack(const device uint* lines, thread uint* codes) {
    uint words[Bits];
    TQAI_UNROLL for (int l = 0; l < Bits; ++l) words[l] = lines[l * kLineWords];
    if (Bits == 8) {
      TQAI_UNROLL for (int n = 0; n < 8; ++n) codes[n] = words[n % Bits];
      return;
    }
    if (Bits == 3) {
      TQAI_UNROLL for (int n = 0; n < 6; ++n) {
        codes[n] = (words[(n / 2) % Bits] >> (n % 2 * 3)) & mask(3);
      }
      TQAI_UNROLL for (int n = 0; n < 2; ++n) {
        const uint upper = (words[2 % Bits] >> (6 + n)) & mask(1);
        codes[6 + n] = ((words[n % Bits] >> 6) & mask(2)) | (upper << 2);
      }
      return;
    }
    TQAI_UNROLL for (int n = 0; n < 8; ++n) codes[n] = 0u;
    TQAI_UNROLL for (int plane = 0; plane < 3; ++plane) {  // the lowest bits first
      const int width = 4 >> plane;
      if ((Bits & width) == 0) continue;
      const int before = Bits & ~(2 * width - 1);  // bits, and as many lines, of the planes before
      const int held = 8 / width;                  // codes in a byte
      TQAI_UNROLL for (int n = 0; n < 8; ++n) {
        const uint word = words[(before + n / held) % Bits];
        codes[n] |= ((word >> (n % held * width)) & mask(width)) << before;
      }
    }
  }
};

// The numbers that a word's four codes stand for.
inline float4 look_up(const threadgroup float* levels, uint codes) {
  return float4(levels[codes & 255u], levels[(codes >> 8) & 255u], levels[(codes >> 16) & 255u],
                levels[codes >> 24]);
}

constexpr int padded(int coordinates) { return (coordinates + kBlock - 1) / kBlock * kBlock; }

// One configuration: widths and dimensions of keys and values, how many queries are computed with
// at once, and simdgroups of a threadgroup.
template <int KeyBits, int ValueBits, int KeyDim, int ValueDim, int Rows, int Simds>
struct Attend {
  static constexpr constant int kKeyDim = padded(KeyDim);
  static constexpr constant int kValueDim = padded(ValueDim);
  static constexpr constant int kValueBlocks = kValueDim / kBlock;
  static constexpr constant int kKeyBytes = kKeyDim * KeyBits * (kTileTokens / 8);
  static constexpr constant int kValueBytes = kValueDim * ValueBits * (kTileTokens / 8);
  static constexpr constant int kTileBytes = kKeyBytes + kValueBytes + 4 * kTileTokens;

  // Threadgroup memory, in floats: queries [Rows, kKeyDim], weights [Simds, Rows, 64], both read by
  // fours, and the levels of keys and values.
  static constexpr constant int kWeights = Rows * kKeyDim;
  static constexpr constant int kKeyLevels = kWeights + Simds * Rows * kTileTokens;
  static constexpr constant int kValueLevels = kKeyLevels + (1 << KeyBits);
  static constexpr constant int kShared = (kValueLevels + (1 << ValueBits) + 3) / 4;  // float4

  // Goes through the tiles of split Simds · at.x + simd, for head at.y % heads of row at.y / heads,
  // and queries from Rows · at.z on.
  //
  // queries: [rows, heads, queries, KeyDim], times the softmax's scale. tiles: [held rows, heads,
  // tiles, kTileBytes]. held: [rows], which of the held rows each is. centre: [rows, heads,
  // queries, centre tokens], what is added to the scores before the cap. bias: what is added after
  // it, where −∞ hides a token. soft_cap: [1], 0: none. maxima, sums: [rows, heads, queries,
  // splits]; outputs: [rows, heads, queries, splits, ValueDim].
  template <typename Queries, typename Held, typename Centre, typename Bias, typename KeyLevels,
            typename ValueLevels, typename Sizes, typename Cap>
  static void run(Queries queries, const device uchar* tiles, Held held, Centre centre, Bias bias,
                  KeyLevels key_levels, ValueLevels value_levels, Sizes sizes, Cap soft_cap,
                  device float* maxima, device float* sums, device float* outputs,
                  threadgroup float4* shared, uint3 at, uint simd, uint lane) {
    threadgroup float* memory = reinterpret_cast<threadgroup float*>(shared);
    const int heads = int(sizes[kHeads]);
    const int row = int(at.y) / heads;
    const int head = int(at.y) % heads;
    const int query_count = int(sizes[kQueries]);
    const int first_query = int(at.z) * Rows;
    const size_t first_of_head = size_t(at.y) * size_t(query_count);

    const int threads = Simds * 32;
    const int thread_index = int(simd) * 32 + int(lane);
    for (int i = thread_index; i < kWeights; i += threads) {
      const int query = first_query + i / kKeyDim;
      const int coordinate = i % kKeyDim;
      const bool given = query < query_count && coordinate < KeyDim;
      memory[i] =
          given ? queries[(first_of_head + size_t(query)) * KeyDim + size_t(coordinate)] : 0.0f;
    }
    for (int i = thread_index; i < (1 << KeyBits); i += threads) {
      memory[kKeyLevels + i] = key_levels[i];
    }
    for (int i = thread_index; i < (1 << ValueBits); i += threads) {
      memory[kValueLevels + i] = value_levels[i];
    }
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    const int splits = int(sizes[kSplits]);
    const int split = int(at.x) * Simds + int(simd);
    if (split >= splits) return;

    // Half a simdgroup takes the words of a line each: of keys, both take a group of 8 coordinates
    // and a thread has four tokens 16 apart; of values, both take 32 tokens and a thread a
    // coordinate.
    const int word = int(lane) % kLineWords;
    const int half_index = int(lane) / kLineWords;
    threadgroup float* weights = memory + kWeights + int(simd) * Rows * kTileTokens;
    const float cap = soft_cap[0];
    const bool has_bias = sizes[kBiasToken] != 0;
    const int tokens = int(sizes[kTokens]);
    const int tile_count = int(sizes[kTiles]);
    const int centre_tokens = int(sizes[kCentreTokens]);
    float maximum[Rows];
    float sum[Rows];  // this thread's share
    float output[Rows][kValueBlocks];
    TQAI_UNROLL for (int r = 0; r < Rows; ++r) {
      maximum[r] = kLowest;
      sum[r] = 0.0f;
      TQAI_UNROLL for (int b = 0; b < kValueBlocks; ++b) output[r][b] = 0.0f;
    }

    const int first = split * int(sizes[kSplitTiles]);
    const int end = metal::min(first + int(sizes[kSplitTiles]), tile_count);
    const size_t first_tile =
        (size_t(held[row]) * size_t(heads) + size_t(head)) * size_t(tile_count);
    for (int t = first; t < end; ++t) {
      const device uchar* tile = tiles + (first_tile + size_t(t)) * size_t(kTileBytes);
      const device uint* keys = reinterpret_cast<const device uint*>(tile);
      const device uint* values = reinterpret_cast<const device uint*>(tile + kKeyBytes);
      const device half* norms =
          reinterpret_cast<const device half*>(tile + kKeyBytes + kValueBytes);

      float4 scores[Rows];  // of tokens word, 16 + word, 32 + word and 48 + word
      TQAI_UNROLL for (int r = 0; r < Rows; ++r) scores[r] = float4(0.0f);
      for (int b = 0; b < kKeyDim / kBlock; ++b) {
        const int group = 2 * b + half_index;
        uint codes[8];
        Width<KeyBits>::unpack(keys + group * KeyBits * kLineWords + word, codes);
        TQAI_UNROLL for (int q = 0; q < 2; ++q) {
          float4 key[4];
          TQAI_UNROLL for (int s = 0; s < 4; ++s) {
            key[s] = look_up(memory + kKeyLevels, codes[4 * q + s]);
          }
          TQAI_UNROLL for (int r = 0; r < Rows; ++r) {
            const float4 query = shared[(r * kKeyDim + 8 * group + 4 * q) / 4];
            scores[r] += float4(metal::dot(query, key[0]), metal::dot(query, key[1]),
                                metal::dot(query, key[2]), metal::dot(query, key[3]));
          }
        }
      }

      // From here on each half has two of the four tokens.
      const int near = 2 * kLineWords * half_index + word;
      const int far = near + kLineWords;
      const int token = t * kTileTokens;
      TQAI_UNROLL for (int r = 0; r < Rows; ++r) {
        const float4 whole = scores[r] + metal::simd_shuffle_xor(scores[r], ushort(kLineWords));
        float2 score = half_index == 0 ? float2(whole.x, whole.y) : float2(whole.z, whole.w);
        score *= float2(float(norms[near]), float(norms[far]));
        const int query = metal::min(first_query + r, query_count - 1);
        const size_t query_row = first_of_head + size_t(query);
        const size_t centre_row = query_row * size_t(centre_tokens);
        if (centre_tokens == 1) {
          score += float2(centre[centre_row]);
        } else {
          score += float2(centre[centre_row + size_t(token + near)],
                          centre[centre_row + size_t(token + far)]);
        }
        if (cap > 0.0f) {
          score = cap *
                  float2(metal::precise::tanh(score.x / cap), metal::precise::tanh(score.y / cap));
        }
        bool sees_near = token + near < tokens;
        bool sees_far = token + far < tokens;
        if (has_bias) {
          const int steps = int(sizes[kSteps]);
          const size_t bias_row = size_t(row) * size_t(sizes[kBiasRow]) +
                                  size_t(head) * size_t(sizes[kBiasHead]) +
                                  size_t(query / steps) * size_t(sizes[kBiasGroup]) +
                                  size_t(query % steps) * size_t(sizes[kBiasStep]);
          if (sees_near) {
            const float added = bias[bias_row + size_t(token + near)];
            sees_near = as_type<uint>(added) != kMinusInfinity;
            score.x += added;
          }
          if (sees_far) {
            const float added = bias[bias_row + size_t(token + far)];
            sees_far = as_type<uint>(added) != kMinusInfinity;
            score.y += added;
          }
        }
        score = float2(sees_near ? score.x : kLowest, sees_far ? score.y : kLowest);
        const float top = metal::max(maximum[r], metal::simd_max(metal::max(score.x, score.y)));
        const float kept = metal::exp(maximum[r] - top);
        const float near_weight = sees_near ? metal::exp(score.x - top) : 0.0f;
        const float far_weight = sees_far ? metal::exp(score.y - top) : 0.0f;
        maximum[r] = top;
        sum[r] = sum[r] * kept + near_weight + far_weight;
        TQAI_UNROLL for (int b = 0; b < kValueBlocks; ++b) output[r][b] *= kept;
        weights[r * kTileTokens + near] = near_weight * float(norms[kTileTokens + near]);
        weights[r * kTileTokens + far] = far_weight * float(norms[kTileTokens + far]);
      }
      metal::simdgroup_barrier(metal::mem_flags::mem_threadgroup);

      const threadgroup float4* weights_by_four =
          shared + (kWeights + int(simd) * Rows * kTileTokens) / 4;
      TQAI_UNROLL for (int b = 0; b < kValueBlocks; ++b) {
        const int group = 2 * b + half_index;
        uint codes[8];
        Width<ValueBits>::unpack(values + group * ValueBits * kLineWords + word, codes);
        TQAI_UNROLL for (int i = 0; i < 8; ++i) {
          const float4 value = look_up(memory + kValueLevels, codes[i]);
          TQAI_UNROLL for (int r = 0; r < Rows; ++r) {
            const int four = (r * kTileTokens + 32 * half_index) / 4 + i;
            output[r][b] += metal::dot(weights_by_four[four], value);
          }
        }
      }
      metal::simdgroup_barrier(metal::mem_flags::mem_threadgroup);  // before they are written again
    }

    TQAI_UNROLL for (int r = 0; r < Rows; ++r) {
      const float total = metal::simd_sum(sum[r]);
      const bool given = first_query + r < query_count;
      const size_t place =
          (first_of_head + size_t(first_query + r)) * size_t(splits) + size_t(split);
      if (given && lane == 0) {
        maxima[place] = maximum[r];
        sums[place] = total;
      }
      TQAI_UNROLL for (int b = 0; b < kValueBlocks; ++b) {
        const float whole =
            output[r][b] + metal::simd_shuffle_xor(output[r][b], ushort(kLineWords));
        const int coordinate = kBlock * b + word;
        if (given && half_index == 0 && coordinate < ValueDim) {
          outputs[place * ValueDim + size_t(coordinate)] = whole;
        }
      }
    }
  }
};

// What `sizes` of merge holds.
enum MergeSize {
  kParts,        // of each query
  kHasPrevious,  // 0 where the previous state is not read
  kMergeSizes,
};

// One softmax's state of several, for coordinate at.x of query at.y, of all rows and heads.
//
// maxima, sums: [queries, parts]; outputs: [queries, parts, ValueDim]; the previous state and the
// merged one: [queries] and [queries, ValueDim].
template <int ValueDim, typename Maxima, typename Sums, typename Outputs, typename PreviousMax,
          typename PreviousSum, typename PreviousOutput, typename Sizes>
void merge(Maxima maxima, Sums sums, Outputs outputs, PreviousMax previous_max,
           PreviousSum previous_sum, PreviousOutput previous_output, Sizes sizes,
           device float* maximum, device float* sum, device float* output, uint3 at) {
  const int parts = int(sizes[kParts]);
  const bool has_previous = sizes[kHasPrevious] != 0;
  const size_t query = size_t(at.y);
  const size_t first = query * size_t(parts);
  const size_t place = query * ValueDim + size_t(at.x);
  float top = has_previous ? previous_max[query] : kLowest;
  for (int p = 0; p < parts; ++p) top = metal::max(top, maxima[first + size_t(p)]);
  float total = 0.0f;
  float value = 0.0f;
  if (has_previous) {
    const float share = metal::exp(previous_max[query] - top);
    total = share * previous_sum[query];
    value = share * previous_output[place];
  }
  for (int p = 0; p < parts; ++p) {
    const size_t part = first + size_t(p);
    const float share = metal::exp(maxima[part] - top);
    total += share * sums[part];
    value += share * outputs[part * ValueDim + size_t(at.x)];
  }
  output[place] = value;
  if (at.x == 0u) {
    maximum[query] = top;
    sum[query] = total;
  }
}

// What `sizes` of Centres::run holds.
enum CentreSize {
  kAsked,        // queries, of all rows and heads
  kCentreTiles,  // tiles
  kFirstTile,    // the first one's place in the table of tiles
  kDistance,     // the first one's distance from that place, in tokens
  kCentreSizes,
};

// What queries give with keys' centres that turn with the position, Re Σ conj(q) m e^(i p ω), for
// tiles of consecutive positions. Angles of far positions have no accurate float: e^(i p ω) is the
// product of what two tables have, of places 64 tokens apart and of distances up to 63 from them.
template <int Pairs, int Rows>
struct Centres {
  static constexpr constant int kPairs = (Pairs + 3) / 4 * 4;
  // Threadgroup memory, float4: factors [Rows, 2, kPairs], turned to the tile's first token.
  static constexpr constant int kShared = Rows * 2 * kPairs / 4;

  // For tile at.x, queries from Rows · at.y on and this thread's token of the tile, 64 in all.
  //
  // factors: [queries, 2, Pairs], of the cosine and the sine of each frequency's angle. fixed:
  // [queries], what is added. tile_cos, tile_sin: [places, Pairs]. cos, sin: [Pairs, 64].
  // scores: [queries, 64 · tiles].
  template <typename Factors, typename Fixed, typename TileCos, typename TileSin, typename Cos,
            typename Sin, typename Sizes>
  static void run(Factors factors, Fixed fixed, TileCos tile_cos, TileSin tile_sin, Cos cos,
                  Sin sin, Sizes sizes, device float* scores, threadgroup float4* shared, uint3 at,
                  uint token) {
    threadgroup float* memory = reinterpret_cast<threadgroup float*>(shared);
    const int queries = int(sizes[kAsked]);
    const int first_query = int(at.y) * Rows;
    const int distance = int(sizes[kDistance]);
    const size_t place = (size_t(sizes[kFirstTile]) + size_t(at.x)) * Pairs;
    for (int i = int(token); i < Rows * kPairs; i += kTileTokens) {
      const int query = first_query + i / kPairs;
      const int f = i % kPairs;
      float a = 0.0f;
      float b = 0.0f;
      if (query < queries && f < Pairs) {
        const float far_cos = tile_cos[place + size_t(f)];
        const float far_sin = tile_sin[place + size_t(f)];
        const float near_cos = cos[f * kTileTokens + distance];
        const float near_sin = sin[f * kTileTokens + distance];
        const float first_cos = far_cos * near_cos - far_sin * near_sin;
        const float first_sin = far_sin * near_cos + far_cos * near_sin;
        const float cos_factor = factors[size_t(query) * (2 * Pairs) + size_t(f)];
        const float sin_factor = factors[size_t(query) * (2 * Pairs) + size_t(Pairs + f)];
        a = cos_factor * first_cos + sin_factor * first_sin;
        b = sin_factor * first_cos - cos_factor * first_sin;
      }
      memory[i / kPairs * 2 * kPairs + f] = a;
      memory[i / kPairs * 2 * kPairs + kPairs + f] = b;
    }
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    float sums[Rows];
    TQAI_UNROLL for (int r = 0; r < Rows; ++r) sums[r] = 0.0f;
    for (int f = 0; f < kPairs; f += 4) {
      float each_cos[4];
      float each_sin[4];
      TQAI_UNROLL for (int i = 0; i < 4; ++i) {
        const bool given = Pairs % 4 == 0 || f + i < Pairs;
        each_cos[i] = given ? cos[(f + i) * kTileTokens + int(token)] : 0.0f;
        each_sin[i] = given ? sin[(f + i) * kTileTokens + int(token)] : 0.0f;
      }
      const float4 cosines = float4(each_cos[0], each_cos[1], each_cos[2], each_cos[3]);
      const float4 sines = float4(each_sin[0], each_sin[1], each_sin[2], each_sin[3]);
      TQAI_UNROLL for (int r = 0; r < Rows; ++r) {
        sums[r] += metal::dot(cosines, shared[(r * 2 * kPairs + f) / 4]) +
                   metal::dot(sines, shared[(r * 2 * kPairs + kPairs + f) / 4]);
      }
    }
    const size_t tokens = size_t(sizes[kCentreTiles]) * size_t(kTileTokens);
    TQAI_UNROLL for (int r = 0; r < Rows; ++r) {
      const int query = first_query + r;
      if (query < queries) {
        scores[size_t(query) * tokens + size_t(at.x) * size_t(kTileTokens) + size_t(token)] =
            fixed[query] + sums[r];
      }
    }
  }
};

}  // namespace tqai
