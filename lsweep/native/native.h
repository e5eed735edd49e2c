// Kernels over samples in SIMD lanes: a `vec` holds one number of L samples, a weight is a scalar.
//
// An activation is laid out [...][L], so every operation is a loop of scalar weight times vector,
// of any shape, and never a shuffle. Float32 as written but that a product and a sum are rounded
// once, and for Winograd's convolutions, which spread the rounding of a large number over its tile.
// NaN comes through.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <type_traits>

#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#define UNROLL _Pragma("GCC unroll 36")

#ifdef __AVX512F__
constexpr int L = 16;
#elif defined(__AVX2__)
constexpr int L = 8;
#else
#error native code is for x86-64 with AVX2
#endif
constexpr int UNITS = 12;  // sums at once: as many as hide the latency of an addition
typedef float vec __attribute__((vector_size(4 * L)));
typedef int ivec __attribute__((vector_size(4 * L)));

// ---- numbers ------------------------------------------------------------------------------------

static INLINE vec all(float x) { return vec{} + x; }
static INLINE vec vmax(vec a, vec b) { return b > a || b != b ? b : a; }  // NaN wins, as in torch
static INLINE vec vmin(vec a, vec b) { return b < a || b != b ? b : a; }
static INLINE vec relu(vec v) { return v < 0 ? vec{} : v; }
static INLINE vec vabs(vec v) { return v < 0 ? -v : v; }
template <int N> static INLINE vec poly(const float (&c)[N], vec x) {
  vec p = all(c[N - 1]);
  UNROLL for (int i = N - 2; i >= 0; i--) p = p * x + c[i];
  return p;
}
static INLINE vec vexp(vec x) {  // 2^n e^r with |r| <= log(2)/2; the polynomials here are our fits
  x = x > 89 ? all(89) : x < -104 ? all(-104) : x;
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

// Calls f(start, size) over 0..N in blocks of B; the size of the last block is what is left.
template <int N, int B, class F> static INLINE void blocks(F f) {
  for (int i = 0; i < N / B; i++) f(i * B, std::integral_constant<int, B>{});
  if constexpr (N % B) f(N / B * B, std::integral_constant<int, N % B>{});
}
// Calls end(m, j, value) for value = sum over c, y, x of a[m][c, y, x] b[j][c][y][x], for all m < M
// and j < n, at the strides A* and B*: a linear layer, or a row of a convolution. A weight is read
// from memory as it is multiplied, which costs nothing.
template <int M, int C, int H, int W, int AM, int AK, int BC, int BH, int BW, class F>
static INLINE void product(const float* a, const vec* b, int n, int step, F end) {
  blocks<M, UNITS>([&](int m0, auto units) {
    for (int j = 0; j < n; j++) {
      vec sums[units()] = {};
      const float* w = a + m0 * AM;
      for (int c = 0; c < C; c++)
        for (int y = 0; y < H; y++)
          for (int x = 0; x < W; x++, w += AK) {
            vec v = b[j * step + c * BC + y * BH + x * BW];
            UNROLL for (int m = 0; m < units(); m++) sums[m] += w[m * AM] * v;
          }
      UNROLL for (int m = 0; m < units(); m++) end(m0 + m, j, sums[m]);
    }
  });
}

// ---- Winograd F(4x4, 3x3): Y = A'[(G w G') * (B' d B)]A (Lavin, Gray 2015, arXiv:1509.09308) ---

// The six points are 0, infinity, 1, -1, 2, -2. Numbers are read s apart and written t apart.
static INLINE void by_G(const vec* w, int s, vec* u, int t) {  // of 3, 6
  vec a = (w[0] + w[2 * s]) * (-1 / 6.f), b = w[s] * (-1 / 6.f);
  vec c = w[0] * (1 / 24.f) + w[2 * s] * (1 / 6.f), d = w[s] * (1 / 12.f);
  u[0] = w[0] * .25f, u[t] = w[2 * s];
  u[2 * t] = a + b, u[3 * t] = a - b, u[4 * t] = c + d, u[5 * t] = c - d;
}
static INLINE void by_B(const vec* d, int s, vec* v, int t) {  // of 6, 6
  vec a = d[4 * s] - 4 * d[2 * s], b = d[3 * s] - 4 * d[s];
  vec c = d[4 * s] - d[2 * s], e = d[3 * s] - d[s];
  v[0] = 4 * d[0] - 5 * d[2 * s] + d[4 * s], v[t] = 4 * d[s] - 5 * d[3 * s] + d[5 * s];
  v[2 * t] = a + b, v[3 * t] = a - b, v[4 * t] = c + 2 * e, v[5 * t] = c - 2 * e;
}
static INLINE void by_A(const vec* m, int s, vec* y, int t) {  // of 6, 4
  vec p = m[2 * s] + m[3 * s], q = m[2 * s] - m[3 * s];
  vec u = m[4 * s] + m[5 * s], w = m[4 * s] - m[5 * s];
  y[0] = m[0] + p + u, y[t] = q + 2 * w, y[2 * t] = p + 4 * u, y[3 * t] = q + 8 * w + m[s];
}
// Transforms N x N numbers to M x M: so many rows at a time as stay in registers, as what is not
// used is not computed.
template <int N, int M, int ROWS, void line(const vec*, int, vec*, int)>
static INLINE void both(const vec* in, int row, int column, vec* out, int step) {
  UNROLL for (int i = 0; i < M; i += ROWS) {
    vec half[N][M];
    UNROLL for (int j = 0; j < N; j++) line(in + j * column, row, half[j], 1);
    UNROLL for (int r = i; r < i + ROWS; r++) line(&half[0][r], M, out + r * M * step, step);
  }
}
// G w G' of every filter: [36][CI][CO].
template <int CI, int CO> static void winograd_weights(const float* w, float* u) {
  constexpr int N = CI * CO;
  for (int i = 0; i < N; i += L) {
    vec f[9] = {}, g[36];
    for (int l = 0; l < L && i + l < N; l++)
      for (int j = 0; j < 9; j++) f[j][l] = w[(i + l) * 9 + j];
    both<3, 6, 6, by_G>(f, 3, 1, g, 1);
    for (int l = 0; l < L && i + l < N; l++)
      for (int k = 0; k < 36; k++) u[k * N + (i + l) % CI * CO + (i + l) / CI] = g[k][l];
  }
}
// Calls end(channel, row, column, value) for an image with margins PY and PX of zeros around it.
template <int CI, int CO, int H, int W, int PY, int PX, int CHANNEL, int ROW, int COLUMN, class F>
static INLINE void winograd(const float* u, const vec* in, vec* scratch, F end) {
  constexpr int OH = H + 2 * PY - 2, OW = W + 2 * PX - 2, TX = (OW + 3) / 4, T = (OH + 3) / 4 * TX;
  constexpr int VS = CI | 1, PS = CO | 1;  // odd: not all in one set of the cache
  constexpr int B = CI * CO > 4096 ? 4 : 1;  // so many tiles share weights in a cache
  for (int t0 = 0; t0 < T; t0 += B) {
    int n = t0 + B < T ? B : T - t0;
    vec *v = scratch, *p = scratch + 36 * VS * B;
    for (int t = 0; t < n; t++) {
      int y = (t0 + t) / TX * 4 - PY, x = (t0 + t) % TX * 4 - PX;
      for (int c = 0; c < CI; c++) {
        const vec* d = in + c * CHANNEL + y * ROW + x * COLUMN;
        vec tile[36];
        UNROLL for (int i = 0; i < 36; i++) {
          bool inside = unsigned(y + i / 6) < H && unsigned(x + i % 6) < W;
          tile[i] = inside ? d[i / 6 * ROW + i % 6 * COLUMN] : vec{};
        }
        both<6, 6, 2, by_B>(tile, 6, 1, v + 36 * VS * t + c, VS);
      }
    }
    for (int k = 0; k < 36; k++)
      product<CO, CI, 1, 1, 1, CO, 1, 0, 0>(
          u + k * (long)(CO * CI), v + k * VS, n, 36 * VS,
          [&](int o, int t, vec sum) { p[(36 * t + k) * PS + o] = sum; });
    for (int t = 0; t < n; t++)
      for (int o = 0; o < CO; o++) {
        int y = (t0 + t) / TX * 4, x = (t0 + t) % TX * 4;
        vec r[16];
        both<6, 4, 4, by_A>(p + 36 * PS * t + o, 6 * PS, PS, r, 1);
        UNROLL for (int i = 0; i < 16; i++)
          if ((OH % 4 == 0 || y + i / 4 < OH) && (OW % 4 == 0 || x + i % 4 < OW))
            end(o, y + i / 4, x + i % 4, r[i]);
      }
  }
}

// ---- samples, points and threads ----------------------------------------------------------------

// log(sum exp z) - z[label], and 100 where the first largest is the label; 0 where it is no class.
static void cross_entropy(const vec* z, const long* labels, float* loss, float* hits, long n) {
  vec top = z[0], best = {}, sum = {};
  for (int c = 1; c < SIZE; c++) best = z[c] > top ? all(c) : best, top = vmax(top, z[c]);
  for (int c = 0; c < SIZE; c++) sum += vexp(z[c] - top);
  for (long l = 0; l < n; l++) {
    bool known = labels[l] >= 0 && labels[l] < SIZE;
    loss[l] = known ? std::log(sum[l]) - (z[labels[l]][l] - top[l]) : 0;
    hits[l] = known && best[l] == labels[l] ? 100 : 0;
  }
}
// The threads of torch, which wait awake for such work: to begin others takes longer than a call.
extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned) __attribute__((weak));
// Calls work(i, thread) for all i < n.
template <class F> static void share(long n, long threads, F work) {
  std::atomic<long> next{0}, thread{0};
  auto run = [&] {
    long mine = thread++;
    for (long i; (i = next++) < n;) work(i, mine);
  };
  auto start = [](void* given) { (*(decltype(run)*)given)(); };
  if (threads > 1 && n > 1 && GOMP_parallel) GOMP_parallel(start, &run, threads, 0);
  else run();
}
// What is generated: weights in Winograd's domain, and the output of a tile of L samples.
static void prepare(const float* w, float* u);
static const vec* network(const vec* const* inputs, long tile, const float* w, const float* u,
                          vec* m);
extern "C" const int lanes = L;

// At each row of weights: the losses of all samples, then all hits; without labels, the output.
extern "C" void forward(const vec* const* inputs, const float* weights, const long* labels,
                        float* out, float* prepared, vec* memory, long samples, long points,
                        long stride, long threads) {
  share(points, threads, [&](long p, long) {
    prepare(weights + p * stride, prepared + p * PREPARED);
  });
  share((samples + L - 1) / L, threads, [&](long tile, long thread) {
    long at = tile * L, n = std::min<long>(L, samples - at);
    for (long p = 0; p < points; p++) {
      const float *w = weights + p * stride, *u = prepared + p * PREPARED;
      const vec* z = network(inputs, tile, w, u, memory + thread * MEMORY);
      float *loss = out + p * samples + at, *to = out + (p * samples + at) * SIZE;
      if (labels) cross_entropy(z, labels + at, loss, loss + points * samples, n);
      else
        for (long i = 0; i < n * SIZE; i++) to[i] = z[i % SIZE][i / SIZE];
    }
  });
}
