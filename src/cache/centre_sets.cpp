#include "centre_sets.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "context.hpp"

namespace tqai::detail {
namespace TQAI_LOCAL {

// A tile is badly served where its centre leaves this many times what a centre of its own would
// leave, which no other tile could use as well. Prose of 1 400 tokens has 2.2 at most, in any head.
constexpr double kBadlyServed = 3.0;
// And this many times what the centre left of the keys that it was chosen from.
constexpr double kGrown = 1.5;
// A new set must bring the energy of the tiles that it is for down by this factor, in some head.
constexpr double kWorthASet = 2.0;
// In the other heads it is another centre where that brings it down by this factor.
constexpr double kBetter = 1.25;
// Of a key's energy: less than that, left or not, makes no difference beside the query's own error.
constexpr double kNegligibleShare = 1e-4;

class Chooser {
 public:
  Chooser(const Context& context, const std::vector<std::vector<Moments>>& moments,
          CentreChoice& choice)
      : context_(context),
        moments_(moments),
        choice_(choice),
        tiles_(moments.front().size()),
        done_(tiles_, false) {
    choice.of_tile.resize(tiles_);
  }

  // The set for tiles of these indices, fresh for all heads.
  Centres fresh(const std::vector<std::size_t>& tiles) const {
    Centres centres = empty();
    for (int head = 0; head < heads(); ++head) {
      choose_centre(context_, pooled(parts(head, tiles)), head, centres);
    }
    return centres;
  }

  void assign() noexcept {
    for (std::size_t tile = 0; tile < tiles_; ++tile) {
      double least = std::numeric_limits<double>::infinity();
      for (std::size_t set = 0; choice_.sets.size() > 1 && set < choice_.sets.size(); ++set) {
        const double cost = cost_of(tile, choice_.sets[set]);
        if (cost >= least) continue;
        least = cost;
        choice_.of_tile[tile] = static_cast<std::int32_t>(set);
      }
    }
  }

  // Adds a set for the tile that is served worst and those like it; false where none needs one.
  bool add_set() {
    const std::size_t worst = worst_tile();
    if (worst == tiles_) return false;
    done_[worst] = true;
    const Centres seed = fresh({worst});
    std::vector<std::size_t> members;
    for (std::size_t tile = 0; tile < tiles_; ++tile) {
      if (tile == worst || cost_of(tile, seed) < cost_of(tile, set_of(tile))) {
        members.push_back(tile);
      }
    }
    Centres centres = fresh(members);
    bool worth = false;
    for (int head = 0; head < heads(); ++head) {
      double before = 0.0;
      double after = 0.0;
      for (const std::size_t tile : members) {
        const Moments& moments = of(head, tile);
        before += left_by(set_of(tile), head, moments) + kNegligibleShare * moments.energy;
        after += left_by(centres, head, moments) + kNegligibleShare * moments.energy;
      }
      worth = worth || before >= kWorthASet * after;
      // The old one comes from more tokens.
      if (before < kBetter * after) copy_centre(set_of(worst), head, centres);
    }
    if (!worth) return true;
    choice_.sets.push_back(std::move(centres));
    assign();
    return true;
  }

  void drop_unused() {
    std::vector<std::int32_t> places(choice_.sets.size(), -1);
    CountedVector<Centres> used;
    for (const std::int32_t set : choice_.of_tile) {
      std::int32_t& place = places[static_cast<std::size_t>(set)];
      if (place >= 0) continue;
      place = static_cast<std::int32_t>(used.size());
      used.push_back(choice_.sets[static_cast<std::size_t>(set)]);
    }
    for (std::int32_t& set : choice_.of_tile) set = places[static_cast<std::size_t>(set)];
    choice_.sets = std::move(used);
  }

 private:
  int heads() const noexcept { return context_.options.kv_heads; }
  const Moments& of(int head, std::size_t tile) const noexcept {
    return moments_[static_cast<std::size_t>(head)][tile];
  }
  const Centres& set_of(std::size_t tile) const noexcept {
    return choice_.sets[static_cast<std::size_t>(choice_.of_tile[tile])];
  }
  Centres empty() const {
    return Centres(CentreShape{heads(), context_.options.head_dim,
                               context_.rope ? context_.rope->pair_count() : 0});
  }
  std::vector<const Moments*> parts(int head, const std::vector<std::size_t>& tiles) const {
    std::vector<const Moments*> parts;
    for (const std::size_t tile : tiles) parts.push_back(&of(head, tile));
    return parts;
  }

  // Heads count by the factor, not the energy, as each has its own softmax.
  double cost_of(std::size_t tile, const Centres& set) const noexcept {
    double cost = 0.0;
    for (int head = 0; head < heads(); ++head) {
      const Moments& moments = of(head, tile);
      cost += std::log(left_by(set, head, moments) + kNegligibleShare * moments.energy +
                       std::numeric_limits<double>::min());
    }
    return cost;
  }

  // tiles_ where none is badly served.
  std::size_t worst_tile() const {
    std::size_t worst = tiles_;
    double most = kBadlyServed;
    for (std::size_t tile = 0; tile < tiles_; ++tile) {
      if (done_[tile]) continue;
      const Centres& set = set_of(tile);
      for (int head = 0; head < heads(); ++head) {
        const Moments& moments = of(head, tile);
        const double nothing = kNegligibleShare * moments.energy;
        const double left = left_by(set, head, moments);
        if (left <= kGrown * static_cast<double>(set.left(head)) + nothing) continue;
        const double times = (left + nothing) / (least_left(context_, moments) + nothing);
        if (!(times > most)) continue;
        worst = tile;
        most = times;
      }
    }
    return worst;
  }

  const Context& context_;
  const std::vector<std::vector<Moments>>& moments_;
  CentreChoice& choice_;
  std::size_t tiles_;
  std::vector<bool> done_;  // tried already
};

}  // namespace TQAI_LOCAL

TQAI_INLINE CentreChoice choose_centre_sets(const Context& context,
                                            const CountedVector<Centres>& held,
                                            const std::vector<std::vector<Moments>>& moments,
                                            std::int64_t row_tiles) {
  CentreChoice choice;
  choice.sets = held;
  Chooser chooser(context, moments, choice);
  if (held.empty()) {
    std::vector<std::size_t> all(choice.of_tile.size());
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = i;
    choice.sets.push_back(chooser.fresh(all));
  }
  chooser.assign();
  // Each time that a row doubles it may have one more, so that sets take a small part of it.
  const auto doublings = static_cast<std::size_t>(
      std::bit_width(static_cast<std::uint64_t>(std::max<std::int64_t>(row_tiles, 1))));
  const std::size_t most = std::min(kMostCentreSets, 1 + doublings);
  while (choice.sets.size() < most && chooser.add_set()) {
  }
  if (held.empty()) chooser.drop_unused();
  return choice;
}

}  // namespace tqai::detail
