// A level's table, from its integer part and its lanes.
#ifndef TQAI_TABLE_INL
#define TQAI_TABLE_INL

#include "attend-inl.hpp"
#include "basis-inl.hpp"
#include "centres-inl.hpp"
#include "encode-inl.hpp"
#include "exact-inl.hpp"
#include "paths-inl.hpp"
#include "rotate-row-inl.hpp"
#include "transform-inl.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

// Integer: as attend-inl.hpp wants it; Lanes: PlainLanes (encode-inl.hpp) or what does better.
template <typename Integer, typename Lanes>
constexpr Kernels table_of(Level level) noexcept {
  return {level,
          prepared_bytes<Integer>,
          prepare_queries<Integer>,
          attend_tiles<Integer>,
          attend_exact<Lanes>,
          load_scaled,
          add_scaled,
          rotate,
          rotate_back,
          encode_side<Lanes>,
          decode_side,
          transform_queries,
          encode_in_basis<Lanes>,
          decode_in_basis,
          acceptable<Lanes>,
          widen_all,
          add_up,
          turn_back,
          add_centre};
}

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_TABLE_INL
