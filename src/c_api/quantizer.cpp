// Codebooks and quantisers.
#include <tqai/codebook.hpp>

#include "calls.hpp"

using namespace tqai::c_api;
using tqai::ValueError;

namespace {

tqai::Grid grid_of(std::int32_t grid) {
  return static_cast<tqai::Grid>(checked("grid", grid, TQAI_GRID_INT8));
}

// The process's own; C sees no more than its address.
const tqai::Codebook& book_of(const tqai_codebook* codebook) {
  return *reinterpret_cast<const tqai::Codebook*>(&given(codebook, "codebook"));
}

const tqai::VectorQuantizer& of(const tqai_quantizer* quantizer) {
  return *given(quantizer, "quantizer").held;
}

static_assert(TQAI_GRID_INT8 == static_cast<int>(tqai::Grid::int8));

}  // namespace

tqai_status tqai_codebook_get(int32_t head_dim, int32_t bits, int32_t grid,
                              const tqai_codebook** codebook) {
  return guarded([&] {
    const tqai_codebook*& got = fresh(codebook, "codebook");
    const tqai::Codebook& held = tqai::codebook(head_dim, bits, grid_of(grid));
    got = reinterpret_cast<const tqai_codebook*>(&held);
  });
}

tqai_status tqai_codebook_centroids(const tqai_codebook* codebook, const float** centroids,
                                    size_t* count) {
  return guarded([&] {
    const auto held = book_of(codebook).centroids();
    (void)given(count, "count");
    given(centroids, "centroids") = held.data();
    *count = held.size();
  });
}

tqai_status tqai_codebook_boundaries(const tqai_codebook* codebook, const float** boundaries,
                                     size_t* count) {
  return guarded([&] {
    const auto held = book_of(codebook).boundaries();
    (void)given(count, "count");
    given(boundaries, "boundaries") = held.data();
    *count = held.size();
  });
}

tqai_status tqai_codebook_levels(const tqai_codebook* codebook, const int8_t** levels,
                                 size_t* count, float* step) {
  return guarded([&] {
    const tqai::Codebook& held = book_of(codebook);
    (void)given(count, "count");
    (void)given(step, "step");
    given(levels, "levels") = held.levels().data();
    *count = held.levels().size();
    *step = held.step();
  });
}

tqai_status tqai_codebook_distortion(const tqai_codebook* codebook, double* distortion) {
  return guarded([&] {
    const double held = book_of(codebook).distortion();
    given(distortion, "distortion") = held;
  });
}

void tqai_quantizer_options_init(tqai_quantizer_options* options, size_t size) {
  const tqai::ProdQuantizerOptions defaults;
  tqai_quantizer_options all{};
  all.bits = defaults.bits;
  all.norm_correction = 1;
  all.seed = defaults.seed;
  all.projection_seed = defaults.projection_seed;
  fill(options, size, all);
}

tqai_status tqai_quantizer_create(const tqai_quantizer_options* options,
                                  tqai_quantizer** quantizer) {
  return guarded([&] {
    tqai_quantizer*& made = fresh(quantizer, "quantizer");
    const tqai_quantizer_options all = known(options, "options", tqai_quantizer_options_init);
    const tqai::RotationKind rotation = rotation_of(all.rotation);
    const tqai::Grid grid = grid_of(all.grid);
    const tqai::CodeKind codes = codes_of("codes", all.codes);
    std::unique_ptr<tqai::VectorQuantizer> held;
    if (all.unbiased != 0) {
      if (codes != tqai::CodeKind::scalar) {
        throw ValueError("codes = " + std::to_string(all.codes) +
                         " for an unbiased quantiser; allowed: TQAI_CODES_SCALAR, 0");
      }
      held = std::make_unique<tqai::ProdQuantizer>(tqai::ProdQuantizerOptions{
          all.head_dim, all.bits, rotation, all.seed, all.projection_seed, grid});
    } else {
      held = std::make_unique<tqai::Quantizer>(tqai::QuantizerOptions{
          all.head_dim, all.bits, rotation, all.seed, grid, all.norm_correction != 0, codes});
    }
    made = new tqai_quantizer{std::move(held)};
  });
}

void tqai_quantizer_destroy(tqai_quantizer* quantizer) { delete quantizer; }

tqai_status tqai_quantizer_sizes(const tqai_quantizer* quantizer, size_t* code_bytes,
                                 int32_t* norms) {
  return guarded([&] {
    const tqai::VectorQuantizer& held = of(quantizer);
    (void)given(norms, "norms");
    given(code_bytes, "code_bytes") = held.code_bytes();
    *norms = held.norm_count();
  });
}

tqai_status tqai_quantizer_encode(const tqai_quantizer* quantizer, const float* vectors,
                                  int64_t rows, uint8_t* codes, uint16_t* norms) {
  return guarded([&] { of(quantizer).encode(vectors, rows, codes, norms); });
}

tqai_status tqai_quantizer_decode(const tqai_quantizer* quantizer, const uint8_t* codes,
                                  const uint16_t* norms, int64_t rows, float* vectors) {
  return guarded([&] { of(quantizer).decode(codes, norms, rows, vectors); });
}

tqai_status tqai_quantizer_inner_products(const tqai_quantizer* quantizer, const float* queries,
                                          int64_t query_rows, const uint8_t* codes,
                                          const uint16_t* norms, int64_t rows, float* products) {
  return guarded(
      [&] { of(quantizer).inner_products(queries, query_rows, codes, norms, rows, products); });
}
