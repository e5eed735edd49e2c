// Kernels over samples in SIMD lanes: a `vec` holds one number of L samples, a weight is a scalar.
//
// An activation is laid out [...][L], so every operation is a loop of scalar weight times vector,
// of any shape, and never a shuffle. Shapes are template parameters or literals of the source.
// Float32 as written: no reassociation, NaN and infinity come through.
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
#error the processor has no AVX2
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
static INLINE vec vlog(vec x) {  // of 1 or more: 2^n m with m from sqrt(1/2), 2 atanh((m-1)/(m+1))
  ivec i = (ivec)x - 0x3f3504f3;
  vec m = (vec)((i & 0x7fffff) + 0x3f3504f3), s = (m - 1) / (m + 1), z = s * s;
  vec n = __builtin_convertvector(i >> 23, vec);
  return n * .693147181f + 2 * s * poly({1, 1 / 3.f, 1 / 5.f, 1 / 7.f, 1 / 9.f}, z);
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
// from memory as it is multiplied, which costs nothing. Where AM is 0, the weights of each block of
// units are [c, y, x][m].
template <int M, int C, int H, int W, int AM, int BC, int BH, int BW, class F>
static INLINE void product(const float* a, const vec* b, int n, int step, F end) {
  blocks<M, UNITS>([&](int m0, auto units) {
    for (int j = 0; j < n; j++) {
      vec sums[units()] = {};
      const float* w = a + m0 * (AM ? AM : C * H * W);
      for (int c = 0; c < C; c++)
        for (int y = 0; y < H; y++)
          for (int x = 0; x < W; x++, w += AM ? 1 : units()) {
            vec v = b[j * step + c * BC + y * BH + x * BW];
            UNROLL for (int m = 0; m < units(); m++) sums[m] += w[m * (AM ? AM : 1)] * v;
          }
      UNROLL for (int m = 0; m < units(); m++) end(m0 + m, j, sums[m]);
    }
  });
}

// ---- Winograd F(4x4, 3x3): Y = A'[(G w G') * (B' d B)]A (Lavin, Gray 2015, arXiv:1509.09308) ---

// G w G' of every filter, [36] times as `product` wants them.
template <int CI, int CO> static void winograd_weights(const float* w, float* u) {
  const float G[6][3] = {{1 / 4.f, 0, 0}, {-1 / 6.f, -1 / 6.f, -1 / 6.f},
                         {-1 / 6.f, 1 / 6.f, -1 / 6.f}, {1 / 24.f, 1 / 12.f, 1 / 6.f},
                         {1 / 24.f, -1 / 12.f, 1 / 6.f}, {0, 0, 1}};
  constexpr int N = CI * CO;
  for (int i = 0; i < N; i += L) {
    vec f[9] = {}, t[6][3], g[36];
    for (int l = 0; l < L && i + l < N; l++)
      for (int j = 0; j < 9; j++) f[j][l] = w[(i + l) * 9 + j];
    UNROLL for (int j = 0; j < 6; j++) UNROLL for (int k = 0; k < 3; k++)
      t[j][k] = G[j][0] * f[k] + G[j][1] * f[3 + k] + G[j][2] * f[6 + k];
    UNROLL for (int j = 0; j < 6; j++) UNROLL for (int k = 0; k < 6; k++)
      g[6 * j + k] = t[j][0] * G[k][0] + t[j][1] * G[k][1] + t[j][2] * G[k][2];
    for (int l = 0; l < L && i + l < N; l++) {
      int o = (i + l) / CI, first = o / UNITS * UNITS, units = std::min(CO - first, UNITS);
      float* to = u + first * CI + (i + l) % CI * units + o % UNITS;
      for (int k = 0; k < 36; k++) to[k * N] = g[k][l];
    }
  }
}
// Rows P and 5 - P, or 1 and 2, or 3 and 4, of B' d: two at a time, so that they stay in registers.
template <int P> static INLINE void two(const vec* d, int s, vec* f, vec* g) {
  if (P == 0) {
    *f = 4 * d[0] - 5 * d[2 * s] + d[4 * s], *g = 4 * d[s] - 5 * d[3 * s] + d[5 * s];
  } else {
    constexpr float q = P == 1 ? 4 : 1, r = P == 1 ? 1 : 2;
    vec a = d[4 * s] - q * d[2 * s], b = d[3 * s] - q * d[s];
    *f = a + r * b, *g = a - r * b;
  }
}
template <int P> static INLINE void into_winograd(const vec* d, int s, vec* v, int step) {
  vec f[2][6];
  UNROLL for (int j = 0; j < 6; j++) two<P>(d + j, s, f[0] + j, f[1] + j);
  UNROLL for (int r = 0; r < 2; r++) {
    vec* row = v + (P ? 2 * P - 1 + r : 5 * r) * 6 * step;
    two<0>(f[r], 1, row, row + 5 * step);
    two<1>(f[r], 1, row + step, row + 2 * step), two<2>(f[r], 1, row + 3 * step, row + 4 * step);
  }
}
static INLINE void out_of(const vec* m, int s, vec* y, int step) {  // six times A
  vec p = m[s] + m[2 * s], q = m[s] - m[2 * s], u = m[3 * s] + m[4 * s], w = m[3 * s] - m[4 * s];
  y[0] = m[0] + p + u, y[step] = q + 2 * w, y[2 * step] = p + 4 * u;
  y[3 * step] = q + 8 * w + m[5 * s];
}
// The input has its rim, so that tiles are whole. end(channel, row, column, value).
template <int CI, int CO, int OH, int OW, int CHANNEL, int ROW, class F>
static INLINE void winograd(const float* u, const vec* in, vec* scratch, F end) {
  constexpr int TX = (OW + 3) / 4, T = (OH + 3) / 4 * TX, VS = CI | 1, PS = CO | 1;  // odd: not all
  constexpr int B = CI * CO > 4096 && T > 3 ? 4 : 1;  // so many tiles share the weights in a cache
  for (int t0 = 0; t0 < T; t0 += B) {                 // in one set of the cache
    int n = t0 + B < T ? B : T - t0;
    vec *v = scratch, *p = scratch + 36 * VS * B;
    for (int t = 0; t < n; t++)
      for (int c = 0; c < CI; c++) {
        const vec* d = in + c * CHANNEL + ((t0 + t) / TX * ROW + (t0 + t) % TX) * 4;
        vec* to = v + 36 * VS * t + c;
        into_winograd<0>(d, ROW, to, VS), into_winograd<1>(d, ROW, to, VS);
        into_winograd<2>(d, ROW, to, VS);
      }
    for (int k = 0; k < 36; k++)
      product<CO, CI, 1, 1, 0, 1, 0, 0>(
          u + k * (long)(CO * CI), v + k * VS, n, 36 * VS,
          [&](int o, int t, vec sum) { p[(36 * t + k) * PS + o] = sum; });
    for (int t = 0; t < n; t++)
      for (int o = 0; o < CO; o++) {
        int y = (t0 + t) / TX * 4, x = (t0 + t) % TX * 4;
        vec h[24], r[16], *q = p + 36 * PS * t + o;
        UNROLL for (int j = 0; j < 6; j++) out_of(q + j * PS, 6 * PS, h + j, 6);
        UNROLL for (int i = 0; i < 4; i++) out_of(h + 6 * i, 1, r + 4 * i, 1);
        UNROLL for (int i = 0; i < 4; i++) UNROLL for (int j = 0; j < 4; j++)
          if ((OH % 4 == 0 || y + i < OH) && (OW % 4 == 0 || x + j < OW))
            end(o, y + i, x + j, r[4 * i + j]);
      }
  }
}

// ---- samples to lanes and back ------------------------------------------------------------------

// L samples from `first` on; lanes that are too many repeat the last of n.
static INLINE void load(const float* in, vec* out, int size, long first, long n) {
  for (long l = 0; l < L; l++) {
    const float* row = in + (first + l < n ? first + l : n - 1) * size;
    for (int i = 0; i < size; i++) ((float*)(out + i))[l] = row[i];
  }
}
static INLINE void store(const vec* x, float* out, int size, long first, long n) {
  for (long l = 0; l < L && first + l < n; l++)
    for (int i = 0; i < size; i++) out[(first + l) * size + i] = x[i][l];
}
static INLINE bool finite(const vec* x, int size) {
  ivec bad = {};
  for (int i = 0; i < size; i++) bad |= x[i] - x[i] != 0;
  for (int l = 0; l < L; l++)
    if (bad[l]) return false;
  return true;
}
// log(sum exp z) - z[label], and 100 where the first largest is the label; 0 where it is no class.
static INLINE void cross_entropy(const vec* z, int classes, const long* labels, float* loss,
                                 float* hits, long first, long n) {
  vec top = z[0], best = {}, sum = {};
  for (int c = 1; c < classes; c++) best = z[c] > top ? all(c) : best, top = vmax(top, z[c]);
  for (int c = 0; c < classes; c++) sum += vexp(z[c] - top);
  vec rest = vlog(sum) + top;
  for (long l = 0, i = first; l < L && i < n; l++, i++) {
    bool known = labels[i] >= 0 && labels[i] < classes;
    loss[i] = known ? rest[l] - z[labels[i]][l] : 0;
    hits[i] = known && best[l] == labels[i] ? 100 : 0;
  }
}

// ---- points and threads -------------------------------------------------------------------------

// What network.py fills in, as numbers of eight bytes.
struct Call {
  const float *const *inputs, *const *constants;
  const float* weights;  // [points][stride]
  float* packed;         // [points][N::packed]: weights in Winograd's domain
  vec* first;            // [rows][tiles][N::mixed]: what the first layer makes of each row
  const float* offsets;  // [points][rows]: how much of it is in a point
  const long* labels;    // null where not losses are wanted, but the output
  float* out;            // [points][samples]: losses, then as many hits; or the output
  char* finite;          // [points]
  vec* memory;           // [threads][N::memory]
  long samples, points, stride, rows, moved, threads;
};
// The threads of torch, which wait awake for such work: to begin others takes longer than a call.
extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned) __attribute__((weak));
// Calls work(i, thread) for all i < n.
template <class F> static void share(long n, long threads, F work) {
  struct Shared {
    F& work;
    long n;
    std::atomic<long> next, thread;
  } shared{work, n, {0}, {0}};
  auto run = [](void* given) {
    auto& s = *(Shared*)given;
    long thread = s.thread++;
    for (long i; (i = s.next++) < s.n;) s.work(i, thread);
  };
  if (threads > 1 && n > 1 && GOMP_parallel) GOMP_parallel(run, &shared, threads, 0);
  else run(&shared);
}
// The first layer of the samples at the row of weights that has the number `points`.
template <class N> static void first_layer(const Call& call) {
  long tiles = (call.samples + L - 1) / L;
  share(tiles, call.threads, [&](long t, long thread) {
    vec *memory = call.memory + thread * N::memory, *row = call.first + call.points * tiles * N::mixed;
    N::first(call, call.weights, t * L, memory, row + t * N::mixed);
  });
}
// The network at all points.
template <class N> static void forward(const Call& call) {
  long n = call.samples, tiles = (n + L - 1) / L;
  if (N::packed && call.moved)
    share(call.points, call.threads, [&](long p, long) {
      N::prepare(call, call.weights + p * call.stride, call.packed + p * N::packed);
    });
  share(tiles, call.threads, [&](long t, long thread) {
    vec mixed[N::mixed + 1], *memory = call.memory + thread * N::memory;
    for (long p = 0; p < call.points; p++) {
      for (int i = 0; i < N::mixed; i++) {
        const vec* row = call.first + t * N::mixed + i;
        mixed[i] = vec{};
        for (long r = 0; r < call.rows; r++)
          mixed[i] += call.offsets[p * call.rows + r] * row[r * tiles * N::mixed];
      }
      const float *w = call.weights + p * call.stride, *packed = call.packed + p * N::packed;
      const vec* out = N::rest(call, w, t * L, memory, packed, mixed);
      if (!finite(out, N::size)) call.finite[p] = 0;
      float *to = call.out + p * n * N::size, *loss = call.out + p * n;
      if (call.labels)
        cross_entropy(out, N::size, call.labels, loss, loss + call.points * n, t * L, n);
      else
        store(out, to, N::size, t * L, n);
    }
  });
}
