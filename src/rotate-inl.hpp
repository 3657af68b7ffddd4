// The arithmetic of a rotation on one row. No namespace and no guard: included inside the
// namespaces that compile it, rotate.hpp's and, in its target region, each kernel's target region.
// Nothing is fused or reassociated (-ffp-contract=off), so every inclusion gives the same bits.

#ifndef TQAI_RESTRICT
#ifdef _MSC_VER
#define TQAI_RESTRICT __restrict
#else
#define TQAI_RESTRICT __restrict__
#endif
#endif

/// x ← H x for the unnormalised Walsh–Hadamard matrix; dim is a power of two. Butterflies
/// (a + b, a − b) in order of stride 1, 2, 4…; dim · log2 dim additions.
inline void fwht_row(float* x, int dim) {
  for (int stride = 1; stride < dim; stride *= 2) {
    for (int block = 0; block < dim; block += 2 * stride) {
      float* TQAI_RESTRICT a = x + block;
      float* TQAI_RESTRICT b = x + block + stride;
      for (int i = 0; i < stride; ++i) {
        const float sum = a[i] + b[i];
        b[i] = a[i] - b[i];
        a[i] = sum;
      }
    }
  }
}

/// y_i = x_i · factors_i; y may be x, which is slow: compilers vectorise for arrays apart.
inline void multiply_row(const float* x, const float* factors, int dim, float* y) {
  for (int i = 0; i < dim; ++i) y[i] = x[i] * factors[i];
}

/// x ← factor · x
inline void scale_row(float* x, int dim, float factor) {
  for (int i = 0; i < dim; ++i) x[i] = x[i] * factor;
}

/// x_i ← factor · x_i · signs_i
inline void scale_signed_row(float* TQAI_RESTRICT x, int dim, float factor, const float* signs) {
  for (int i = 0; i < dim; ++i) x[i] = x[i] * factor * signs[i];
}

/// y = Σ_k x_k · columns[k], summed from k = 0 on. columns: [dim, dim], row k is the matrix's
/// column k, so that the inner loop has no horizontal sum; y overlaps nothing.
inline void matrix_row(const float* columns, const float* x, int dim, float* TQAI_RESTRICT y) {
  for (int i = 0; i < dim; ++i) y[i] = 0.0F;
  int k = 0;
  for (; k + 4 <= dim; k += 4) {  // four at once spare reading and writing y
    const float* TQAI_RESTRICT c = columns + static_cast<long long>(k) * dim;
    for (int i = 0; i < dim; ++i) {
      float sum = y[i] + c[i] * x[k];
      sum = sum + c[i + dim] * x[k + 1];
      sum = sum + c[i + 2 * dim] * x[k + 2];
      y[i] = sum + c[i + 3 * dim] * x[k + 3];
    }
  }
  for (; k < dim; ++k) {
    const float* TQAI_RESTRICT c = columns + static_cast<long long>(k) * dim;
    for (int i = 0; i < dim; ++i) y[i] = y[i] + c[i] * x[k];
  }
}
