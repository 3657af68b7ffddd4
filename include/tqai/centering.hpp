// What is subtracted from keys before they are quantised.
#pragma once

#include <cstdint>

namespace tqai {

/// Softmax ignores what moves all scores of a query alike, so a constant may leave a head's keys
/// and come back as one number per query, exactly; the quantisation error shrinks with the norm
/// that is left. `none`: keys as they are. `mean`: the head's mean key. `automatic`: per batch row
/// and head, whichever leaves less energy in the tokens of the first sealing; frozen from then on.
enum class Centering : std::uint8_t { automatic, none, mean };

}  // namespace tqai
