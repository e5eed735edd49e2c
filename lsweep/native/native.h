// Kernels over samples in SIMD lanes: a `vec` holds one number of L samples, a weight is a scalar.
//
// An activation is laid out [...][L], so every operation is a loop of scalar weight times vector,
// of any shape, and never a shuffle. Shapes are template parameters or literals of the source.
// Float32 as written: no reassociation, NaN and infinity come through.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <thread>
#include <type_traits>
#include <vector>

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 36")

// MB x NB accumulators fill the registers; a weight is read from memory as it is multiplied.
#ifdef __AVX512F__
constexpr int L = 16, MB = 6, NB = 4, WINO_M = 8, WINO_T = 4;
#elif defined(__AVX2__)
constexpr int L = 8, MB = 3, NB = 4, WINO_M = 4, WINO_T = 2;
#else
#error the processor has no AVX2
#endif
typedef float vec __attribute__((vector_size(4 * L)));
typedef int ivec __attribute__((vector_size(4 * L)));

// Calls f(start, size) over 0..N in blocks of B; the size of the last block is what is left.
template <int N, int B, class F> static INLINE void blocks(F f) {
  for (int i = 0; i < N / B; i++) f(i * B, std::integral_constant<int, B>{});
  if constexpr (N % B) f(N / B * B, std::integral_constant<int, N % B>{});
}

// ---- numbers ------------------------------------------------------------------------------------

static INLINE vec all(float x) { return vec{} + x; }
static INLINE vec vmax(vec a, vec b) { return b > a || b != b ? b : a; }  // NaN wins, as in torch
static INLINE vec vmin(vec a, vec b) { return b < a || b != b ? b : a; }
static INLINE vec relu(vec v) { return v < 0 ? vec{} : v; }
static INLINE vec vabs(vec v) { return v < 0 ? -v : v; }
template <int N> static INLINE vec poly(const float (&c)[N], vec x) {
  vec p = vec{} + c[N - 1];
  UNROLL for (int i = N - 2; i >= 0; i--) p = p * x + c[i];
  return p;
}
static INLINE vec vexp(vec x) {  // 2^n e^r with |r| <= log(2)/2; the polynomials here are our fits
  x = x > 89 ? vec{} + 89 : x < -104 ? vec{} - 104 : x;
  vec n = x * 1.44269504f + 12582912.f - 12582912.f;  // to the nearest integer
  vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = poly({1, 1, .500000011f, .166664154f, .0416662181f, .00837513527f, .00139485899f}, r);
  ivec i = __builtin_convertvector(n, ivec), half = i >> 1;  // 2^n may be beyond a float
  return p * (vec)((half + 127) << 23) * (vec)((i - half + 127) << 23);
}
static INLINE vec vtanh(vec x) {
  vec a = vabs(x), z = x * x, big = 1 - 2 / (vexp(2 * a) + 1);
  vec small = x * poly({1, -.333333293f, .133331678f, -.0539428569f, .0216817469f, -.00813400324f,
                        .0021052621f}, z);
  return a < .625f ? small : x < 0 ? -big : big;
}
static INLINE vec sigmoid(vec x) { return 1 / (1 + vexp(-x)); }

// ---- products -----------------------------------------------------------------------------------

// acc[m][n] = sum over c, y, x of a[m][c, y, x] b[c][y][x][n], at the strides A*, B*.
template <int M, int N, int C, int H, int W, int AM, int AK, int BC, int BH, int BW, int BN>
static INLINE void block(const float* a, const vec* b, vec (&acc)[M][N]) {
  UNROLL for (int m = 0; m < M; m++) UNROLL for (int n = 0; n < N; n++) acc[m][n] = vec{};
  int k = 0;
  for (int c = 0; c < C; c++)
    for (int y = 0; y < H; y++)
      for (int x = 0; x < W; x++, k++) {
        const vec* p = b + c * BC + y * BH + x * BW;
        vec v[N];
        UNROLL for (int n = 0; n < N; n++) v[n] = p[n * BN];
        UNROLL for (int m = 0; m < M; m++) {
          float w = a[m * AM + k * AK];
          UNROLL for (int n = 0; n < N; n++) acc[m][n] += w * v[n];
        }
      }
}

// end(m, n, value) for value = sum over k of a[m][k] b[k][n].
template <int M, int N, int K, int AM, int AK, int BK, int BN, class F>
static INLINE void product(const float* a, const vec* b, F end) {
  blocks<N, NB>([&](int n0, auto nb) {
    blocks<M, MB>([&](int m0, auto mb) {
      constexpr int ms = decltype(mb)::value, ns = decltype(nb)::value;
      vec acc[ms][ns];
      block<ms, ns, K, 1, 1, AM, AK, BK, 0, 0, BN>(a + m0 * AM, b + n0 * BN, acc);
      UNROLL for (int m = 0; m < ms; m++)
        UNROLL for (int n = 0; n < ns; n++) end(m0 + m, n0 + n, acc[m][n]);
    });
  });
}

// Convolution over a copy with a rim of zeros. end(channel, index in the output, value).
template <int CI, int CO, int H, int W, int KH, int KW, int SH, int SW, int PH, int PW, int DH,
          int DW, int GROUPS, class F>
static INLINE void conv(const float* w, const vec* in, vec* scratch, F end) {
  constexpr int RH = H + 2 * PH, RW = W + 2 * PW, GI = CI / GROUPS, GO = CO / GROUPS;
  constexpr int OH = (RH - DH * (KH - 1) - 1) / SH + 1, OW = (RW - DW * (KW - 1) - 1) / SW + 1;
  const vec* rimmed = in;
  if (PH || PW) {
    for (int i = 0; i < CI * RH * RW; i++) {
      int c = i / (RH * RW), y = i / RW % RH - PH, x = i % RW - PW;
      bool there = y >= 0 && y < H && x >= 0 && x < W;
      scratch[i] = there ? in[(c * H + y) * W + x] : vec{};
    }
    rimmed = scratch;
  }
  for (int g = 0; g < GROUPS; g++)
    for (int y = 0; y < OH; y++)
      blocks<OW, NB>([&](int x0, auto nb) {
        blocks<GO, MB>([&](int m0, auto mb) {
          constexpr int ms = decltype(mb)::value, ns = decltype(nb)::value, K = GI * KH * KW;
          vec acc[ms][ns];
          const vec* corner = rimmed + (g * GI * RH + y * SH) * RW + x0 * SW;
          const float* weights = w + (g * GO + m0) * K;
          block<ms, ns, GI, KH, KW, K, 1, RH * RW, DH * RW, DW, SW>(weights, corner, acc);
          UNROLL for (int m = 0; m < ms; m++) UNROLL for (int n = 0; n < ns; n++) {
            int o = g * GO + m0 + m;
            end(o, (o * OH + y) * OW + x0 + n, acc[m][n]);
          }
        });
      });
}

// ---- Winograd F(4x4, 3x3): Y = A'[(G w G') * (B' d B)]A (Lavin, Gray 2015, arXiv:1509.09308) ---

constexpr int padded(int channels) { return (channels + WINO_M - 1) / WINO_M * WINO_M; }

// G w G' of every filter, in float64, laid out [36][channels / WINO_M][CI][WINO_M].
template <int CI, int CO> static void winograd_weights(const float* w, float* u) {
  typedef double wide __attribute__((vector_size(8 * WINO_M)));
  typedef float narrow __attribute__((vector_size(4 * WINO_M)));
  const double G[6][3] = {{1 / 4., 0, 0}, {-1 / 6., -1 / 6., -1 / 6.}, {-1 / 6., 1 / 6., -1 / 6.},
                          {1 / 24., 1 / 12., 1 / 6.}, {1 / 24., -1 / 12., 1 / 6.}, {0, 0, 1}};
  for (long o = 0; o < CO; o += WINO_M)
    for (int c = 0; c < CI; c++) {
      wide f[9] = {}, t[6][3] = {};
      for (int m = 0; m < WINO_M && o + m < CO; m++)
        for (int j = 0; j < 9; j++) f[j][m] = w[((o + m) * CI + c) * 9 + j];
      UNROLL for (int i = 0; i < 6; i++)
        UNROLL for (int j = 0; j < 9; j++) t[i][j % 3] += G[i][j / 3] * f[j];
      UNROLL for (int k = 0; k < 36; k++) {
        const wide* row = t[k / 6];
        wide g = row[0] * G[k % 6][0] + row[1] * G[k % 6][1] + row[2] * G[k % 6][2];
        narrow rounded = __builtin_convertvector(g, narrow);
        float* to = u + (k * (long)padded(CO) + o) * CI + c * WINO_M;
        __builtin_memcpy(to, &rounded, sizeof rounded);
      }
    }
}
static INLINE void into(const vec* d, vec* t, int step) {  // a row of six times B
  vec a = d[4] - 4 * d[2], b = d[3] - 4 * d[1], c = d[4] - d[2], e = d[3] - d[1];
  t[0] = 4 * d[0] - 5 * d[2] + d[4], t[step] = a + b, t[2 * step] = a - b;
  t[3 * step] = c + 2 * e, t[4 * step] = c - 2 * e, t[5 * step] = 4 * d[1] - 5 * d[3] + d[5];
}
// B' d B of a 6 x 6 patch, at most two rows at a time so that they stay in registers.
static INLINE void into_winograd(const vec* d, int s, vec* v, int step) {
  vec f[6], g[6];
  UNROLL for (int j = 0; j < 6; j++) f[j] = 4 * d[j] - 5 * d[2 * s + j] + d[4 * s + j];
  into(f, v, step);
  UNROLL for (int j = 0; j < 6; j++) f[j] = 4 * d[s + j] - 5 * d[3 * s + j] + d[5 * s + j];
  into(f, v + 30 * step, step);
  UNROLL for (int j = 0; j < 6; j++) {
    vec a = d[4 * s + j] - 4 * d[2 * s + j], b = d[3 * s + j] - 4 * d[s + j];
    f[j] = a + b, g[j] = a - b;
  }
  into(f, v + 6 * step, step), into(g, v + 12 * step, step);
  UNROLL for (int j = 0; j < 6; j++) {
    vec a = d[4 * s + j] - d[2 * s + j], b = d[3 * s + j] - d[s + j];
    f[j] = a + 2 * b, g[j] = a - 2 * b;
  }
  into(f, v + 18 * step, step), into(g, v + 24 * step, step);
}
static INLINE void out_of(const vec* m, int s, vec* y, int step) {  // six times A
  vec p = m[s] + m[2 * s], q = m[s] - m[2 * s], u = m[3 * s] + m[4 * s], w = m[3 * s] - m[4 * s];
  y[0] = m[0] + p + u, y[step] = q + 2 * w, y[2 * step] = p + 4 * u;
  y[3 * step] = q + 8 * w + m[5 * s];
}
template <int CI, int CO, int H, int W, int PH, int PW, class F>
static INLINE void winograd(const float* u, const vec* in, vec* scratch, F end) {
  constexpr int OH = H + 2 * PH - 2, OW = W + 2 * PW - 2, TX = (OW + 3) / 4, T = (OH + 3) / 4 * TX;
  constexpr int B = T < WINO_T ? T : WINO_T, O = padded(CO) < 64 ? padded(CO) : 64;
  constexpr int VS = CI * B + 1, PS = O * B + 1;  // odd, or all 36 would share a set of the cache
  vec *V = scratch, *P = scratch + 36 * VS;
  for (int t0 = 0; t0 < T; t0 += B) {
    for (int t = 0; t < B; t++) {
      int tile = t0 + t < T ? t0 + t : T - 1, y = tile / TX * 4 - PH, x = tile % TX * 4 - PW;
      bool inside = y >= 0 && x >= 0 && y + 6 <= H && x + 6 <= W;
      for (int c = 0; c < CI; c++) {
        const vec* d = in + (c * H + y) * W + x;
        if (inside) {
          into_winograd(d, W, V + c * B + t, VS);
          continue;
        }
        vec rim[36];
        for (int i = 0; i < 6; i++)
          for (int j = 0; j < 6; j++) {
            bool there = y + i >= 0 && y + i < H && x + j >= 0 && x + j < W;
            rim[i * 6 + j] = there ? d[i * W + j] : vec{};
          }
        into_winograd(rim, 6, V + c * B + t, VS);
      }
    }
    for (int o0 = 0; o0 < padded(CO); o0 += O) {
      for (int k = 0; k < 36; k++)
        for (int o = 0; o < O && o0 + o < padded(CO); o += WINO_M) {
          vec acc[WINO_M][B];
          const float* weights = u + (k * (long)padded(CO) + o0 + o) * CI;
          block<WINO_M, B, CI, 1, 1, 1, WINO_M, B, 0, 0, 1>(weights, V + k * VS, acc);
          UNROLL for (int m = 0; m < WINO_M; m++)
            UNROLL for (int t = 0; t < B; t++) P[k * PS + (o + m) * B + t] = acc[m][t];
        }
      for (int o = o0; o < o0 + O && o < CO; o++)
        for (int t = 0; t < B && t0 + t < T; t++) {
          vec h[24], r[16];
          const vec* p = P + (o - o0) * B + t;
          UNROLL for (int j = 0; j < 6; j++) out_of(p + j * PS, 6 * PS, h + j, 6);
          UNROLL for (int i = 0; i < 4; i++) out_of(h + 6 * i, 1, r + 4 * i, 1);
          int y = (t0 + t) / TX * 4, x = (t0 + t) % TX * 4;
          UNROLL for (int i = 0; i < 4; i++) UNROLL for (int j = 0; j < 4; j++)
            if ((OH % 4 == 0 || y + i < OH) && (OW % 4 == 0 || x + j < OW))
              end(o, (o * OH + y + i) * OW + x + j, r[4 * i + j]);
        }
    }
  }
}

// ---- windows ------------------------------------------------------------------------------------

// Where window i begins and ends, and its size with the rim; a stride of 0 shares the input evenly.
struct Window {
  int begin, end, rimmed;
  INLINE Window(int i, int size, int outs, int kernel, int stride, int pad) {
    begin = stride ? i * stride - pad : i * size / outs;
    end = stride ? std::min(begin + kernel, size + pad) : ((i + 1) * size + outs - 1) / outs;
    rimmed = end - begin, begin = std::max(begin, 0), end = std::min(end, size);
  }
};
template <bool MAX>
static INLINE void pool(const vec* x, vec* out, int H, int W, int OH, int OW, int KH, int KW,
                        int SH, int SW, int PH, int PW, bool rim) {
  for (int i = 0; i < OH; i++)
    for (int j = 0; j < OW; j++) {
      Window r(i, H, OH, KH, SH, PH), c(j, W, OW, KW, SW, PW);
      vec s = MAX ? x[r.begin * W + c.begin] : vec{};
      for (int y = r.begin; y < r.end; y++)
        for (int z = c.begin; z < c.end; z++) s = MAX ? vmax(s, x[y * W + z]) : s + x[y * W + z];
      int cells = rim ? r.rimmed * c.rimmed : (r.end - r.begin) * (c.end - c.begin);
      out[i * OW + j] = MAX ? s : s / (float)cells;
    }
}

// ---- samples to lanes and back ------------------------------------------------------------------

// Groups of G x L samples from n; the lanes that are too many repeat the last sample.
static INLINE void load(const float* in, vec* out, int size, int groups, long first, long n) {
  for (int g = 0; g < groups; g++)
    for (int l = 0; l < L; l++) {
      long sample = first + g * L + l;
      const float* row = in + (sample < n ? sample : n - 1) * size;
      float* to = (float*)(out + (long)g * size) + l;
      for (int i = 0; i < size; i++) to[(long)i * L] = row[i];
    }
}
// Returns whether all that it stored was finite.
static INLINE bool store(const vec* x, float* out, int size, int groups, long first, long n) {
  ivec bad = {};
  for (int i = 0; i < groups * size; i++) bad |= x[i] - x[i] != 0;
  for (int g = 0; g < groups; g++)
    for (int l = 0; l < L && first + g * L + l < n; l++)
      for (int i = 0; i < size; i++) out[(first + g * L + l) * size + i] = x[(long)g * size + i][l];
  for (int l = 0; l < L; l++)
    if (bad[l]) return false;
  return true;
}
// Calls tile(first sample, thread) for all of n in steps. As many threads as asked share them where
// that is worth it: one takes tenths of a millisecond to begin beside those of torch, which spin.
template <class F> static void over(long n, long step, int threads, F tile) {
  std::atomic<long> next{0};
  auto work = [&](int thread, long most) {
    for (long at; most-- && (at = next++ * step) < n;) tile(at, thread);
  };
  std::vector<std::thread> others;
  if (threads > 1 && n > step) {
    auto start = std::chrono::steady_clock::now();
    work(0, 1);
    std::chrono::duration<double> one = std::chrono::steady_clock::now() - start;
    if (one.count() * (n / step) < 2e-3) threads = 1;
    for (int i = 1; i < threads && (i + 1) * step < n; i++) others.emplace_back(work, i, n);
  }
  work(0, n);
  for (auto& t : others) t.join();
}
