// What is subtracted from keys before they are quantised.
#pragma once

#include <cstdint>
#include <vector>

namespace tqai {

/// Softmax ignores what moves all scores of a query alike, so a part of the keys that is known from
/// their position alone may be left out of the codes and come back in the scores, exactly; the
/// quantisation error shrinks with the norm that is left.
/// `none`: keys as they are. `mean`: the head's mean key. `rope`: the head's mean key before rotary
/// position embedding, turned to each position; needs `CacheOptions::rope`. `automatic`: per batch
/// row and head, whichever leaves the least energy in the tokens of the first sealing, `rope` only
/// where it leaves clearly less, since it costs time. A centre stays what it is; where later tokens
/// are badly served by all that a row has, another is chosen for them in the same way.
enum class Centering : std::uint8_t { automatic, none, mean, rope };

/// The rotary position embedding that keys have gone through: pair f of a key is turned by the
/// angle p · inv_freq[f], p being the key's position in the pair's section. Positions count from
/// any origin. Where a cache is told others than the model's, results are as right, only less well
/// compressed.
struct Rope {
  /// Which coordinates make pair f: `half_split` f and f + rotary_dim / 2 (Llama, Qwen),
  /// `interleaved` 2f and 2f + 1 (GPT-J, Cohere).
  enum class Layout : std::uint8_t { half_split, interleaved };

  std::vector<float> inv_freq;         ///< [rotary_dim / 2], radians per token, scaling included
  Layout layout = Layout::half_split;  ///< of the pairs
  int rotary_dim = 0;                  ///< even, 2…head_dim: the first coordinates of a head
  /// [rotary_dim / 2], the section of each pair, for embeddings of several positions a token (the
  /// time, height and width of M-RoPE, arXiv:2409.12191); empty: all pairs are of section 0.
  std::vector<std::uint8_t> sections = {};

  /// Positions a token at most.
  static constexpr int kMaxSections = 4;
  /// The largest section, and one.
  int section_count() const noexcept {
    int largest = 0;  // without <algorithm>, whose reading takes longer than this header's
    for (const int section : sections) largest = section > largest ? section : largest;
    return 1 + largest;
  }
};

}  // namespace tqai
