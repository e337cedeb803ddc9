// The machine as decode.cu sees it: one instruction each, or nearly. tests/lanes.h has the same functions for a CPU.
#pragma once
#pragma nv_diag_suppress 177
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
#define UNROLL _Pragma("unroll")
#define UNROLL_BY_8 _Pragma("unroll 8")
#define ROLLED _Pragma("unroll 1")
#define DEVICE __device__ __forceinline__
#define GRID_CONSTANT __grid_constant__
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads, 1)
#define KERNEL_OF(registers) extern "C" __global__ void __maxnreg__(registers)
#define GLOBAL extern "C" __global__ void
extern __shared__ __align__(128) char shared_memory[];
#define SHARED_MEMORY shared_memory

DEVICE int thread_number() { return threadIdx.x; }
DEVICE int block_number() { return blockIdx.x; }
DEVICE int threads_in_block() { return blockDim.x; }
DEVICE int blocks_in_grid() { return gridDim.x; }
DEVICE void barrier_of_block() { __syncthreads(); }
DEVICE void barrier(int id, int threads) { asm volatile("bar.sync %0,%1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE bool barrier_any(int id, int threads, bool p) {
    int r;
    asm volatile("{.reg .pred p,q; setp.ne.s32 p,%3,0; bar.red.or.pred q,%1,%2,p; selp.s32 %0,1,0,q;}" : "=r"(r) : "r"(id), "r"(threads), "r"((int)p) : "memory");
    return r;
}
DEVICE float shuffle_xor(float x, int k) { return __shfl_xor_sync(~0u, x, k); }
template <class T> DEVICE T shuffle(T x, int lane) { return __shfl_sync(~0u, x, lane); }
// words that are read once: they pass by the first-level cache
DEVICE uint32_t load1(const uint32_t* p) { uint32_t v; asm volatile("ld.global.cs.b32 %0,[%1];" : "=r"(v) : "l"(p)); return v; }
DEVICE void barrier_of_warp() { __syncwarp(); }
// 16 bytes to shared memory, which arrive some time after a group of copies has ended
DEVICE void copy16_if(bool p, uint32_t* to, const uint32_t* from) {
    asm volatile("{.reg .pred p; setp.ne.s32 p,%2,0; @p cp.async.cg.shared.global [%0],[%1],16;}" ::"r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from), "r"((int)p));
}
DEVICE void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LATEST> DEVICE void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(LATEST) : "memory"); }  // but for the latest groups
// The kernel launched behind this one may begin (sm_90), and waits here for all that this one has written.
#if __CUDA_ARCH__ >= 900
DEVICE void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;"); }
DEVICE void wait_for_prerequisites() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#else
DEVICE void launch_dependents() {}
DEVICE void wait_for_prerequisites() {}
#endif
DEVICE uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
DEVICE uint32_t shared1(uint32_t at) { uint32_t v; asm volatile("ld.shared.b32 %0,[%1];" : "=r"(v) : "r"(at)); return v; }
DEVICE void shared2(uint32_t at, uint32_t& a, uint32_t& b) { asm volatile("ld.shared.v2.b32 {%0,%1},[%2];" : "=r"(a), "=r"(b) : "r"(at)); }
DEVICE void read2(uint32_t* v, const void* p) { const uint2 x = *(const uint2*)p; v[0] = x.x, v[1] = x.y; }
DEVICE void read4(uint32_t* v, const void* p) { const uint4 x = *(const uint4*)p; v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w; }
DEVICE void read4_if(bool p, uint32_t* v, const void* at) {  // from shared memory; else anything
    asm volatile("{.reg .pred p; setp.ne.s32 p,%5,0; @p ld.shared.v4.b32 {%0,%1,%2,%3},[%4];}"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"((uint32_t)__cvta_generic_to_shared(at)), "r"((int)p));
}
DEVICE void prefetch_line(const void* p) { asm volatile("prefetch.global.L1 [%0];" ::"l"(p)); }
DEVICE void store4(uint32_t* p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) { *(uint4*)p = make_uint4(a, b, c, d); }
DEVICE void store4(float* p, float a, float b, float c, float d) { *(float4*)p = make_float4(a, b, c, d); }
DEVICE void store2(float* p, float x, float y) { *(float2*)p = make_float2(x, y); }
DEVICE void add_shared(int* p, int x) { atomicAdd(p, x); }
DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t which) { return __byte_perm(a, b, which); }
DEVICE uint32_t dp4a(uint32_t a, uint32_t b, uint32_t c) { return __dp4a(a, b, c); }
// d += a b, 16 x 16 times 16 x 8
DEVICE void multiply(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) { uint32_t d; asm("fma.rn.f16x2 %0,%1,%2,%3;" : "=r"(d) : "r"(a), "r"(b), "r"(c)); return d; }
DEVICE uint32_t halves(float a, float b) { uint32_t d; asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(d) : "f"(b), "f"(a)); return d; }
DEVICE uint16_t to_half(float x) { uint16_t h; asm("cvt.rn.f16.f32 %0,%1;" : "=h"(h) : "f"(x)); return h; }
DEVICE uint16_t to_bfloat(float x) { uint16_t h; asm("cvt.rn.bf16.f32 %0,%1;" : "=h"(h) : "f"(x)); return h; }
DEVICE float from_half(uint16_t h) { float x; asm("cvt.f32.f16 %0,%1;" : "=f"(x) : "h"(h)); return x; }
DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }
DEVICE float infinity() { return __uint_as_float(0x7F800000u); }
DEVICE float maximum(float a, float b) { return fmaxf(a, b); }
DEVICE float exp2_of(float x) { float y; asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x)); return y; }
DEVICE void quick_cos_sin(float x, float& c, float& s) { s = __sinf(x), c = __cosf(x); }
DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }
DEVICE int quick_quotient(int n, int d) { return (int)__fdividef(n + 0.5f, (float)d); }  // of n below 2^21
DEVICE int round_int(float x) { return __float2int_rn(x); }
