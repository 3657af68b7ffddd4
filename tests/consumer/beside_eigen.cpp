// Appends, seals and attends with Eigen's matrices, beside an application's own use of Eigen;
// nonzero where a result is wrong.
#include <Eigen/QR>
#include <cmath>
#include <cstdio>
#include <tqai/eigen.hpp>

// The application's own decomposition, built for its own processor: were the library to bring weak
// symbols of Eigen along, the linker would merge the two, and memory be freed as it was not
// allocated.
static bool decomposes() {
  const Eigen::MatrixXd matrix = Eigen::MatrixXd::Random(96, 96);
  const Eigen::HouseholderQR<Eigen::MatrixXd> qr(matrix);
  const Eigen::MatrixXd q = qr.householderQ();
  const tqai::Rotation rotation(96, tqai::RotationKind::haar, 1);
  const tqai::RowMatrix rows = tqai::RowMatrix::Identity(96, 96);
  tqai::RowMatrix rotated(96, 96);
  rotation.apply(rows, rotated);
  return (q.transpose() * q - Eigen::MatrixXd::Identity(96, 96)).norm() < 1e-12 &&
         (rotated * rotated.transpose() - tqai::RowMatrix::Identity(96, 96)).norm() < 1e-4F;
}

int main() {
  if (!decomposes()) return 1;
  constexpr int kTokens = 200;
  constexpr int kDim = 64;
  tqai::CacheOptions options;
  options.kv_heads = 1;
  options.head_dim = kDim;
  options.residual_window = 8;
  options.bits_v = 8;
  tqai::KvCache cache(options);

  // Equal values: whatever the weights, attention returns the value, up to its 8 bits.
  const tqai::RowMatrix keys = tqai::RowMatrix::Random(kTokens, kDim);
  const tqai::RowMatrix value = tqai::RowMatrix::Random(1, kDim);
  cache.append(keys, value.replicate(kTokens, 1));
  cache.seal();

  tqai::RowMatrix output(1, kDim);
  cache.attend(tqai::RowMatrix::Random(1, kDim), output);
  const float error = (output - value).norm() / value.norm();
  std::printf("%lld tokens, %lld packed, error %.4f\n", static_cast<long long>(cache.tokens()),
              static_cast<long long>(cache.packed_tokens(0)), static_cast<double>(error));
  if (cache.packed_tokens(0) == 0 || !(error < 0.02F)) return 1;

  try {
    cache.append(keys.leftCols(kDim / 2), keys);
  } catch (const tqai::ValueError& refused) {  // caught across the library's border
    std::printf("refused: %s\n", refused.what());
    return 0;
  }
  return 1;
}
