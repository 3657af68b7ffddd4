// What of the Metal Shading Language attend.metal uses, in CUDA's C++, for NVRTC, which knows no
// headers and takes all functions for the device's. A threadgroup is a block, a simdgroup a warp.
#pragma once

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using uint8_t = unsigned char;
using int64_t = long long;

// Address spaces are found by the compiler; the kernels themselves say what is shared.
#define constant
#define device
#define thread
#define threadgroup

namespace tqai {

// CUDA's own have no constructors and operators.
struct float2 {
  float x, y;
  explicit float2(float all) : x(all), y(all) {}
  float2(float a, float b) : x(a), y(b) {}
  float2& operator+=(float2 o) { return *this = float2(x + o.x, y + o.y); }
  float2& operator*=(float2 o) { return *this = float2(x * o.x, y * o.y); }
};
inline float2 operator*(float a, float2 b) { return float2(a * b.x, a * b.y); }

struct alignas(16) float4 {
  float x, y, z, w;
  float4() = default;
  explicit float4(float all) : x(all), y(all), z(all), w(all) {}
  float4(float a, float b, float c, float d) : x(a), y(b), z(c), w(d) {}
  float4& operator+=(float4 o) { return *this = float4(x + o.x, y + o.y, z + o.z, w + o.w); }
};
inline float4 operator+(float4 a, float4 b) { return a += b; }

struct half {
  unsigned short bits;
  explicit operator float() const {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(bits));
    return wide;
  }
};

template <typename To>
To as_type(float from) {
  return static_cast<To>(__float_as_uint(from));
}

// Numbers of the host's, which come with the launch.
struct Sizes {
  int64_t numbers[16];
  int64_t operator[](int i) const { return numbers[i]; }
};
struct Cap {
  float number;
  float operator[](int) const { return number; }
};

}  // namespace tqai

namespace metal {

using tqai::float4;

enum class mem_flags { mem_threadgroup };
inline void threadgroup_barrier(mem_flags) { __syncthreads(); }
inline void simdgroup_barrier(mem_flags) { __syncwarp(); }

inline float max(float a, float b) { return fmaxf(a, b); }
inline int min(int a, int b) { return a < b ? a : b; }

inline float simd_shuffle_xor(float value, ushort mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}
inline float4 simd_shuffle_xor(float4 value, ushort mask) {
  return float4(simd_shuffle_xor(value.x, mask), simd_shuffle_xor(value.y, mask),
                simd_shuffle_xor(value.z, mask), simd_shuffle_xor(value.w, mask));
}
inline float simd_sum(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += simd_shuffle_xor(value, ushort(mask));
  return value;
}
inline float simd_max(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value = max(value, simd_shuffle_xor(value, ushort(mask)));
  return value;
}

inline float dot(float4 a, float4 b) {
  return fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, a.w * b.w)));
}
inline float exp(float x) { return expf(x); }
namespace precise {
inline float tanh(float x) { return tanhf(x); }
}  // namespace precise

}  // namespace metal
