/* The C functions as a C program sees them: what they do, and what they say to mistakes. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tqai/c_api.h>

static int g_failures = 0;

static void expect(int holds, const char* what, int line) {
  if (holds) return;
  fprintf(stderr, "line %d: %s (last error: %s)\n", line, what, tqai_last_error());
  ++g_failures;
}
#define EXPECT(condition) expect((condition), #condition, __LINE__)

/* The call fails with this status, and its message has this part. */
static void expect_error(tqai_status got, tqai_status wanted, const char* part, int line) {
  if (got == wanted && strstr(tqai_last_error(), part) != NULL) return;
  fprintf(stderr, "line %d: status %d, \"%s\"; expected %d, \"%s\"\n", line, (int)got,
          tqai_last_error(), (int)wanted, part);
  ++g_failures;
}
#define EXPECT_ERROR(call, status, part) expect_error((call), (status), (part), __LINE__)

enum { kHeads = 2, kDim = 16, kTokens = 200, kNumbers = kHeads * kTokens * kDim };

static float g_keys[kNumbers];
static float g_values[kNumbers];

/* [1, heads, tokens, dim] of contiguous data, or its first tokens. */
static tqai_tensor tensor(const float* data, int64_t heads, int64_t tokens, int64_t stride_tokens) {
  tqai_tensor t;
  memset(&t, 0, sizeof(t));
  t.data = data;
  t.dtype = TQAI_F32;
  t.shape[0] = 1;
  t.shape[1] = heads;
  t.shape[2] = tokens;
  t.shape[3] = kDim;
  t.strides[0] = heads * stride_tokens * kDim;
  t.strides[1] = stride_tokens * kDim;
  t.strides[2] = kDim;
  t.strides[3] = 1;
  return t;
}

static tqai_output output(float* data, int64_t heads, int64_t tokens) {
  const tqai_tensor t = tensor(data, heads, tokens, tokens);
  tqai_output o;
  o.data = data;
  o.dtype = t.dtype;
  memcpy(o.shape, t.shape, sizeof(o.shape));
  memcpy(o.strides, t.strides, sizeof(o.strides));
  return o;
}

static void fill(void) {
  unsigned state = 1;
  int i;
  for (i = 0; i < kNumbers; ++i) {
    state = state * 1664525U + 1013904223U;
    g_keys[i] = (float)(state >> 8) / 8388608.0F - 1.0F;
    state = state * 1664525U + 1013904223U;
    g_values[i] = (float)(state >> 8) / 8388608.0F - 1.0F;
  }
}

static tqai_cache_options options(void) {
  tqai_cache_options o;
  tqai_cache_options_init(&o, sizeof(o));
  o.kv_heads = kHeads;
  o.head_dim = kDim;
  o.bits_v = 4;
  o.residual_window = 16;
  return o;
}

static tqai_cache* filled(void) {
  const tqai_cache_options o = options();
  const tqai_tensor keys = tensor(g_keys, kHeads, kTokens, kTokens);
  const tqai_tensor values = tensor(g_values, kHeads, kTokens, kTokens);
  tqai_cache* cache = NULL;
  int64_t held = -1;
  EXPECT(tqai_cache_create(&o, &cache) == TQAI_OK && cache != NULL);
  EXPECT(tqai_cache_append(cache, &keys, &values, NULL) == TQAI_OK);
  EXPECT(tqai_cache_seal(cache, &held) == TQAI_OK && held == 0);
  EXPECT(tqai_cache_seal(cache, NULL) == TQAI_OK);
  return cache;
}

static int64_t tokens_of(const tqai_cache* cache) {
  tqai_cache_info info;
  tqai_cache_info_init(&info, sizeof(info));
  EXPECT(tqai_cache_get_info(cache, &info) == TQAI_OK);
  return info.tokens;
}

static void test_versions(void) {
  const char* level = NULL;
  EXPECT(tqai_abi_version() == TQAI_ABI_VERSION);
  EXPECT(strcmp(tqai_version(), TQAI_PROJECT_VERSION) == 0);
  EXPECT(strcmp(TQAI_VERSION, TQAI_PROJECT_VERSION) == 0);
  EXPECT(tqai_default_level(&level) == TQAI_OK && strlen(level) > 3);
  EXPECT_ERROR(tqai_default_level(NULL), TQAI_VALUE_ERROR, "name is NULL");
}

static void test_create(void) {
  tqai_cache_options o = options();
  tqai_cache* cache = (tqai_cache*)&o;
  struct {
    tqai_cache_options known;
    int64_t more;
  } grown;
  EXPECT_ERROR(tqai_cache_create(&o, NULL), TQAI_VALUE_ERROR, "cache is NULL");
  EXPECT_ERROR(tqai_cache_create(NULL, &cache), TQAI_VALUE_ERROR, "options is NULL");
  EXPECT(cache == NULL);
  o.size = 0;
  EXPECT_ERROR(tqai_cache_create(&o, &cache), TQAI_VALUE_ERROR, "options->size = 0");
  o = options();
  o.bits_k = 9;
  EXPECT_ERROR(tqai_cache_create(&o, &cache), TQAI_VALUE_ERROR, "bits_k = 9");
  o = options();
  o.dtype = TQAI_BOOL;
  EXPECT_ERROR(tqai_cache_create(&o, &cache), TQAI_VALUE_ERROR, "dtype = 3");
  o = options();
  o.rotation = -1;
  EXPECT_ERROR(tqai_cache_create(&o, &cache), TQAI_VALUE_ERROR, "rotation = -1");
  o = options();
  o.centering = 4;
  EXPECT_ERROR(tqai_cache_create(&o, &cache), TQAI_VALUE_ERROR, "centering = 4");
  o = options();
  o.rotary_dim = 8;
  EXPECT_ERROR(tqai_cache_create(&o, &cache), TQAI_VALUE_ERROR, "inv_freq is NULL");
  o.rotary_dim = 1 << 30;
  EXPECT_ERROR(tqai_cache_create(&o, &cache), TQAI_VALUE_ERROR, "rotary_dim = 1073741824");
  o = options();
  o.rope_layout = 2;
  o.inv_freq = g_keys;
  o.rotary_dim = 8;
  EXPECT_ERROR(tqai_cache_create(&o, &cache), TQAI_VALUE_ERROR, "rope_layout = 2");
  o = options();
  o.value_codes = 2;
  EXPECT_ERROR(tqai_cache_create(&o, &cache), TQAI_VALUE_ERROR, "value_codes = 2");
  o = options();
  o.key_codes = 2;
  EXPECT_ERROR(tqai_cache_create(&o, &cache), TQAI_VALUE_ERROR, "key_codes = 2");
  o.key_codes = TQAI_CODES_TRELLIS;
  EXPECT_ERROR(tqai_cache_create(&o, &cache), TQAI_VALUE_ERROR, "there is no key_basis");
  o = options();
  o.value_codes = TQAI_CODES_TRELLIS;
  o.bits_v = 5;
  EXPECT_ERROR(tqai_cache_create(&o, &cache), TQAI_VALUE_ERROR, "bits_v = 5");
  o = options();
  o.level = "sse9";
  EXPECT_ERROR(tqai_cache_create(&o, &cache), TQAI_VALUE_ERROR, "sse9");
  o = options();
  o.batch = 0;
  EXPECT_ERROR(tqai_cache_create(&o, &cache), TQAI_VALUE_ERROR, "batch = 0");
  /* A program that knows more members than the library. */
  memset(&grown, 0, sizeof(grown));
  grown.known = options();
  grown.known.size = sizeof(grown);
  EXPECT(tqai_cache_create(&grown.known, &cache) == TQAI_OK);
  tqai_cache_destroy(cache);
  grown.more = 1;
  EXPECT_ERROR(tqai_cache_create(&grown.known, &cache), TQAI_VALUE_ERROR, "does not have");
  /* One that knows fewer: what it does not set has the default. */
  o = options();
  o.level = "sse9";
  o.size = offsetof(tqai_cache_options, level);
  EXPECT(tqai_cache_create(&o, &cache) == TQAI_OK);
  tqai_cache_destroy(cache);
  /* What such a program has behind its structure is not written to. */
  memset(&o, 0x55, sizeof(o));
  tqai_cache_options_init(&o, offsetof(tqai_cache_options, level));
  EXPECT(o.size == offsetof(tqai_cache_options, level) && o.bits_k == 4);
  EXPECT(memcmp((const char*)&o + o.size, "UUUUUUUU", 8) == 0);
  memset(&grown, 0x55, sizeof(grown));
  tqai_cache_options_init(&grown.known, sizeof(grown));
  EXPECT(grown.known.size == sizeof(grown) && grown.more == 0);
  memset(&o, 0x55, sizeof(o));
  tqai_cache_options_init(&o, 0);
  EXPECT(memcmp(&o, "UUUUUUUU", 8) == 0);
  tqai_cache_destroy(NULL);
  tqai_cache_options_init(NULL, 8);
  tqai_attend_options_init(NULL, 8);
  tqai_cache_info_init(NULL, 8);
  tqai_memory_init(NULL, 8);
  tqai_load_options_init(NULL, 8);
  tqai_quantizer_options_init(NULL, 8);
}

static void test_trellis(void) {
  tqai_cache_options o = options();
  const tqai_tensor keys = tensor(g_keys, kHeads, kTokens, kTokens);
  const tqai_tensor values = tensor(g_values, kHeads, kTokens, kTokens);
  tqai_cache_info info;
  tqai_cache* cache = NULL;
  int64_t packed = 0;
  o.value_codes = TQAI_CODES_TRELLIS;
  EXPECT(tqai_cache_create(&o, &cache) == TQAI_OK);
  EXPECT(tqai_cache_append(cache, &keys, &values, NULL) == TQAI_OK);
  EXPECT(tqai_cache_seal(cache, NULL) == TQAI_OK);
  EXPECT(tqai_cache_packed_tokens(cache, 0, &packed) == TQAI_OK && packed > 0);
  tqai_cache_info_init(&info, sizeof(info));
  EXPECT(tqai_cache_get_info(cache, &info) == TQAI_OK);
  EXPECT(info.value_codes == TQAI_CODES_TRELLIS);
  tqai_cache_destroy(cache);
}

static void test_append(void) {
  const float inv_freq[4] = {1.0F, 0.3F, 0.1F, 0.03F};
  const uint8_t sections[4] = {0, 0, 1, 1};
  int64_t places[2 * kTokens];
  tqai_cache_options o = options();
  tqai_tensor keys = tensor(g_keys, kHeads, kTokens, kTokens);
  tqai_tensor values = tensor(g_values, kHeads, kTokens, kTokens);
  tqai_positions positions;
  tqai_cache* cache = NULL;
  int i;
  o.rotary_dim = 8;
  o.inv_freq = inv_freq;
  o.sections = sections;
  EXPECT(tqai_cache_create(&o, &cache) == TQAI_OK);
  for (i = 0; i < kTokens; ++i) {
    places[i] = 3 * i;
    places[kTokens + i] = i / 4;
  }
  memset(&positions, 0, sizeof(positions));
  positions.data = places;
  positions.shape[0] = 1;
  positions.shape[1] = 2;
  positions.shape[2] = kTokens;
  positions.strides[0] = 2 * kTokens;
  positions.strides[1] = kTokens;
  positions.strides[2] = 1;
  EXPECT(tqai_cache_append(cache, &keys, &values, &positions) == TQAI_OK);
  EXPECT(tokens_of(cache) == kTokens);
  positions.shape[2] = 1;
  EXPECT_ERROR(tqai_cache_append(cache, &keys, &values, &positions), TQAI_VALUE_ERROR, "position");
  positions.data = NULL;
  EXPECT_ERROR(tqai_cache_append(cache, &keys, &values, &positions), TQAI_VALUE_ERROR,
               "positions->data is NULL");
  {
    const tqai_tensor nothing = tensor(NULL, kHeads, 0, 0);
    positions.shape[2] = 0;
    EXPECT(tqai_cache_append(cache, &nothing, &nothing, &positions) == TQAI_OK);
    EXPECT(tokens_of(cache) == kTokens);
  }
  EXPECT_ERROR(tqai_cache_append(NULL, &keys, &values, NULL), TQAI_VALUE_ERROR, "cache is NULL");
  EXPECT_ERROR(tqai_cache_append(cache, NULL, &values, NULL), TQAI_VALUE_ERROR, "keys is NULL");
  EXPECT_ERROR(tqai_cache_append(cache, &keys, NULL, NULL), TQAI_VALUE_ERROR, "values is NULL");
  keys.dtype = 7;
  EXPECT_ERROR(tqai_cache_append(cache, &keys, &values, NULL), TQAI_VALUE_ERROR, "dtype = 7");
  keys.dtype = TQAI_F16;
  EXPECT_ERROR(tqai_cache_append(cache, &keys, &values, NULL), TQAI_VALUE_ERROR, "float16");
  keys = tensor(g_keys, 1, kTokens, kTokens);
  EXPECT_ERROR(tqai_cache_append(cache, &keys, &values, NULL), TQAI_VALUE_ERROR, "shape");
  keys = tensor(NULL, kHeads, kTokens, kTokens);
  EXPECT(tqai_cache_append(cache, &keys, &values, NULL) == TQAI_VALUE_ERROR);
  EXPECT_ERROR(tqai_cache_seal(NULL, NULL), TQAI_VALUE_ERROR, "cache is NULL");
  EXPECT(tokens_of(cache) == kTokens);
  tqai_cache_destroy(cache);
}

/* Softmax attention of one query head over all tokens, in doubles. */
static double error_of(const float* query, const float* got, int head, int64_t tokens, int window) {
  double weights[kTokens];
  double most = -1e30;
  double sum = 0.0;
  double worst = 0.0;
  int64_t t;
  int c;
  for (t = 0; t < tokens; ++t) {
    double score = 0.0;
    for (c = 0; c < kDim; ++c) {
      score += (double)query[c] * (double)g_keys[(head * kTokens + t) * kDim + c];
    }
    weights[t] = window > 0 && t <= tokens - 1 - window ? -1e30 : score / 4.0;
    if (weights[t] > most) most = weights[t];
  }
  for (t = 0; t < tokens; ++t) {
    weights[t] = exp(weights[t] - most);
    sum += weights[t];
  }
  for (c = 0; c < kDim; ++c) {
    double value = 0.0;
    for (t = 0; t < tokens; ++t) {
      value += weights[t] / sum * (double)g_values[(head * kTokens + t) * kDim + c];
    }
    if (fabs(value - (double)got[c]) > worst) worst = fabs(value - (double)got[c]);
  }
  return worst;
}

/* Memory that no tensor has, or that something else is in; nothing is read or written. */
static void test_memory_of_tensors(void) {
  tqai_cache* cache = filled();
  float out[4 * kDim];
  float queries[4 * kDim];
  tqai_tensor q = tensor(queries, 4, 1, 1);
  tqai_output o = output(out, 1, 4);
  tqai_attend_options settings;
  memset(queries, 0, sizeof(queries));
  o.data = queries;
  EXPECT_ERROR(tqai_cache_attend(cache, &q, &o, NULL), TQAI_VALUE_ERROR, "overlaps the queries");
  o.data = (char*)out + 2;
  EXPECT_ERROR(tqai_cache_attend(cache, &q, &o, NULL), TQAI_VALUE_ERROR, "multiple of 4 bytes");
  o.data = NULL;
  EXPECT_ERROR(tqai_cache_attend(cache, &q, &o, NULL), TQAI_VALUE_ERROR, "output has no data");
  o.data = out;
  o.strides[2] = 0;
  EXPECT_ERROR(tqai_cache_attend(cache, &q, &o, NULL), TQAI_VALUE_ERROR, "at one address");
  o.strides[2] = INT64_MIN;
  EXPECT_ERROR(tqai_cache_attend(cache, &q, &o, NULL), TQAI_VALUE_ERROR, "out of any memory");
  o.strides[2] = kDim;
  q.strides[1] = INT64_MAX / 2;
  EXPECT_ERROR(tqai_cache_attend(cache, &q, &o, NULL), TQAI_VALUE_ERROR, "out of any memory");
  q.strides[1] = kDim;
  tqai_attend_options_init(&settings, sizeof(settings));
  settings.sink_scores = (const float*)(const void*)((const char*)queries + 1);
  EXPECT_ERROR(tqai_cache_attend(cache, &q, &o, &settings), TQAI_VALUE_ERROR, "sink_scores lies");
  EXPECT(tqai_cache_attend(cache, &q, &o, NULL) == TQAI_OK);
  tqai_cache_destroy(cache);
}

static void test_attend(void) {
  tqai_cache* cache = filled();
  float out[4 * kDim];
  float queries[4 * kDim];
  unsigned char seen[kTokens];
  tqai_tensor q = tensor(queries, 4, 1, 1);
  tqai_output o = output(out, 1, 4); /* [batch, queries, query heads, dim] */
  tqai_attend_options settings;
  tqai_tensor mask = tensor(NULL, 1, 1, 1);
  float sink_scores[4] = {50.0F, 50.0F, 50.0F, 50.0F};
  int head;
  memcpy(queries, g_values, sizeof(queries));
  EXPECT(tqai_cache_attend(cache, &q, &o, NULL) == TQAI_OK);
  for (head = 0; head < 4; ++head) {
    EXPECT(error_of(queries + head * kDim, out + head * kDim, head / 2, kTokens, 0) < 0.05);
  }
  tqai_attend_options_init(&settings, sizeof(settings));
  settings.window = 10;
  settings.has_scale = 1;
  settings.scale = 0.25F;
  EXPECT(tqai_cache_attend(cache, &q, &o, &settings) == TQAI_OK);
  EXPECT(error_of(queries, out, 0, kTokens, 10) < 1e-4);
  settings.scale = NAN;
  EXPECT_ERROR(tqai_cache_attend(cache, &q, &o, &settings), TQAI_VALUE_ERROR, "scale = ");
  settings.scale = -2.4e38F; /* queries in base 2 would be infinite */
  EXPECT_ERROR(tqai_cache_attend(cache, &q, &o, &settings), TQAI_VALUE_ERROR, "scale = -2.4e+38");
  /* The same ten tokens by a mask. */
  tqai_attend_options_init(&settings, sizeof(settings));
  memset(seen, 0, sizeof(seen));
  memset(seen + kTokens - 10, 1, 10);
  mask.data = seen;
  mask.dtype = TQAI_BOOL;
  mask.shape[3] = kTokens;
  memset(mask.strides, 0, sizeof(mask.strides));
  mask.strides[3] = 1;
  settings.mask = &mask;
  EXPECT(tqai_cache_attend(cache, &q, &o, &settings) == TQAI_OK);
  EXPECT(error_of(queries, out, 0, kTokens, 10) < 1e-4);
  mask.dtype = 4;
  EXPECT_ERROR(tqai_cache_attend(cache, &q, &o, &settings), TQAI_VALUE_ERROR, "dtype = 4");
  mask.dtype = TQAI_BF16;
  mask.shape[3] = 3;
  EXPECT_ERROR(tqai_cache_attend(cache, &q, &o, &settings), TQAI_VALUE_ERROR, "mask has shape");
  mask.dtype = TQAI_F16;
  EXPECT_ERROR(tqai_cache_attend(cache, &q, &o, &settings), TQAI_VALUE_ERROR, "mask has shape");
  mask.dtype = TQAI_F32;
  EXPECT_ERROR(tqai_cache_attend(cache, &q, &o, &settings), TQAI_VALUE_ERROR, "mask has shape");
  settings.mask = NULL;
  settings.sink_scores = sink_scores;
  EXPECT(tqai_cache_attend(cache, &q, &o, &settings) == TQAI_OK);
  EXPECT(fabsf(out[0]) < 1e-6F); /* the sink takes all of the softmax */
  settings.first_token = -1;
  EXPECT_ERROR(tqai_cache_attend(cache, &q, &o, &settings), TQAI_VALUE_ERROR, "first_token = -1");
  settings.size = 1;
  EXPECT_ERROR(tqai_cache_attend(cache, &q, &o, &settings), TQAI_VALUE_ERROR, "size = 1");
  EXPECT_ERROR(tqai_cache_attend(NULL, &q, &o, NULL), TQAI_VALUE_ERROR, "cache is NULL");
  EXPECT_ERROR(tqai_cache_attend(cache, NULL, &o, NULL), TQAI_VALUE_ERROR, "queries is NULL");
  EXPECT_ERROR(tqai_cache_attend(cache, &q, NULL, NULL), TQAI_VALUE_ERROR, "output is NULL");
  o.shape[1] = 2;
  EXPECT_ERROR(tqai_cache_attend(cache, &q, &o, NULL), TQAI_VALUE_ERROR, "output");
  tqai_cache_destroy(cache);
}

static void test_gather(void) {
  static float keys[kNumbers];
  static float values[kNumbers];
  tqai_cache* cache = filled();
  tqai_output k = output(keys, kHeads, kTokens);
  tqai_output v = output(values, kHeads, kTokens);
  double squares = 0.0;
  double error = 0.0;
  int i;
  EXPECT(tqai_cache_gather(cache, 0, &k, &v) == TQAI_OK);
  EXPECT(memcmp(keys, g_keys, 4 * kDim * sizeof(float)) == 0); /* sinks are exact */
  for (i = 0; i < kNumbers; ++i) {
    squares += (double)g_keys[i] * (double)g_keys[i];
    error += ((double)keys[i] - (double)g_keys[i]) * ((double)keys[i] - (double)g_keys[i]);
  }
  EXPECT(error > 0.0 && error < 0.02 * squares);
  EXPECT_ERROR(tqai_cache_gather(cache, 1, &k, &v), TQAI_INDEX_ERROR, "of a cache of 200");
  EXPECT_ERROR(tqai_cache_gather(cache, 0, NULL, &v), TQAI_VALUE_ERROR, "keys is NULL");
  EXPECT_ERROR(tqai_cache_gather(cache, 0, &k, NULL), TQAI_VALUE_ERROR, "values is NULL");
  EXPECT_ERROR(tqai_cache_gather(NULL, 0, &k, &v), TQAI_VALUE_ERROR, "cache is NULL");
  tqai_cache_destroy(cache);
}

static void test_rows(void) {
  tqai_cache* cache = filled();
  tqai_cache* copy = NULL;
  const int64_t rows[3] = {0, 0, 0};
  const int64_t padding[3] = {1, 0, 0};
  const int64_t none[1] = {1};
  int64_t packed = -1;
  tqai_cache_info info;
  tqai_memory memory;
  struct {
    size_t size;
    int32_t batch;
  } few;
  EXPECT(tqai_cache_copy(cache, &copy) == TQAI_OK);
  EXPECT(tqai_cache_select(cache, rows, 3) == TQAI_OK);
  EXPECT(tqai_cache_crop(cache, 100) == TQAI_OK);
  EXPECT(tokens_of(copy) == kTokens && tokens_of(cache) == 100);
  tqai_cache_info_init(&info, sizeof(info));
  EXPECT(tqai_cache_get_info(cache, &info) == TQAI_OK);
  EXPECT(info.batch == 3 && info.kv_heads == kHeads && info.head_dim == kDim);
  EXPECT(info.value_head_dim == kDim && info.dtype == TQAI_F32 && info.bits_k == 4);
  EXPECT(info.bits_v == 4 && info.sink_tokens == 4 && info.residual_window == 16);
  EXPECT(info.first_token == 0 && strlen(info.level) > 3);
  few.size = sizeof(few);
  few.batch = 0;
  EXPECT(tqai_cache_get_info(cache, (tqai_cache_info*)(void*)&few) == TQAI_OK);
  EXPECT(few.batch == 3 && few.size == sizeof(few));
  EXPECT(tqai_cache_packed_tokens(cache, 2, &packed) == TQAI_OK && packed == 96);
  EXPECT_ERROR(tqai_cache_packed_tokens(cache, 3, &packed), TQAI_INDEX_ERROR, "row 3");
  EXPECT_ERROR(tqai_cache_packed_tokens(NULL, 0, &packed), TQAI_VALUE_ERROR, "cache is NULL");
  EXPECT_ERROR(tqai_cache_packed_tokens(cache, 0, NULL), TQAI_VALUE_ERROR, "tokens is NULL");
  tqai_memory_init(&memory, sizeof(memory));
  EXPECT(tqai_cache_get_memory(copy, &memory) == TQAI_OK);
  EXPECT(memory.tokens == kTokens && memory.packed_tokens == 128 && memory.mapped_bytes == 0);
  EXPECT(memory.total_bytes == memory.packed_bytes + memory.exact_bytes + memory.overhead_bytes);
  EXPECT(memory.uncompressed_bytes == sizeof(g_keys) + sizeof(g_values));
  EXPECT(tqai_allocated_bytes() >= memory.total_bytes);
  memory.size = 0;
  EXPECT_ERROR(tqai_cache_get_memory(copy, &memory), TQAI_VALUE_ERROR, "memory->size = 0");
  EXPECT_ERROR(tqai_cache_get_memory(copy, NULL), TQAI_VALUE_ERROR, "memory is NULL");
  EXPECT_ERROR(tqai_cache_get_memory(NULL, &memory), TQAI_VALUE_ERROR, "cache is NULL");
  EXPECT_ERROR(tqai_cache_get_info(NULL, &info), TQAI_VALUE_ERROR, "cache is NULL");
  EXPECT_ERROR(tqai_cache_get_info(cache, NULL), TQAI_VALUE_ERROR, "info is NULL");
  EXPECT_ERROR(tqai_cache_crop(cache, 101), TQAI_VALUE_ERROR, "crop to 101");
  EXPECT_ERROR(tqai_cache_crop(NULL, 0), TQAI_VALUE_ERROR, "cache is NULL");
  EXPECT_ERROR(tqai_cache_select(cache, NULL, 2), TQAI_VALUE_ERROR, "rows is NULL");
  EXPECT_ERROR(tqai_cache_select(cache, NULL, 0), TQAI_VALUE_ERROR, "no rows");
  EXPECT_ERROR(tqai_cache_select(copy, none, 1), TQAI_INDEX_ERROR, "row 1");
  EXPECT_ERROR(tqai_cache_select(NULL, rows, 1), TQAI_VALUE_ERROR, "cache is NULL");
  EXPECT_ERROR(tqai_cache_set_padding(cache, padding, 3), TQAI_VALUE_ERROR, "sealed");
  EXPECT_ERROR(tqai_cache_set_padding(cache, padding, 1), TQAI_VALUE_ERROR, "1 padding counts");
  EXPECT_ERROR(tqai_cache_set_padding(cache, NULL, 3), TQAI_VALUE_ERROR, "counts is NULL");
  EXPECT_ERROR(tqai_cache_set_padding(NULL, padding, 3), TQAI_VALUE_ERROR, "cache is NULL");
  EXPECT(tqai_cache_discard_before(copy, 80) == TQAI_OK);
  EXPECT(tqai_cache_get_info(copy, &info) == TQAI_OK && info.first_token > 4);
  EXPECT_ERROR(tqai_cache_discard_before(copy, -1), TQAI_VALUE_ERROR, "before token -1");
  EXPECT_ERROR(tqai_cache_discard_before(NULL, 0), TQAI_VALUE_ERROR, "cache is NULL");
  tqai_cache_destroy(copy);
  EXPECT_ERROR(tqai_cache_copy(NULL, &copy), TQAI_VALUE_ERROR, "cache is NULL");
  EXPECT(copy == NULL);
  EXPECT_ERROR(tqai_cache_copy(cache, NULL), TQAI_VALUE_ERROR, "copy is NULL");
  tqai_cache_destroy(cache);
}

static void test_padding(void) {
  const tqai_cache_options o = options();
  const tqai_tensor keys = tensor(g_keys, kHeads, 20, kTokens);
  const tqai_tensor values = tensor(g_values, kHeads, 20, kTokens);
  const int64_t count = 5;
  tqai_cache* cache = NULL;
  tqai_memory memory;
  EXPECT(tqai_cache_create(&o, &cache) == TQAI_OK);
  EXPECT(tqai_cache_append(cache, &keys, &values, NULL) == TQAI_OK);
  EXPECT(tqai_cache_set_padding(cache, &count, 1) == TQAI_OK);
  tqai_memory_init(&memory, sizeof(memory));
  EXPECT(tqai_cache_get_memory(cache, &memory) == TQAI_OK && memory.tokens == 15);
  tqai_cache_destroy(cache);
}

static void test_leave_out(void) {
  const tqai_cache_options o = options();
  const tqai_tensor keys = tensor(g_keys, kHeads, 20, kTokens);
  const tqai_tensor values = tensor(g_values, kHeads, 20, kTokens);
  const uint8_t hidden[6] = {0, 1, 1, 0, 1, 0};
  tqai_token_span spans[2];
  size_t count = 9;
  tqai_cache* cache = NULL;
  tqai_memory memory;
  EXPECT(tqai_cache_create(&o, &cache) == TQAI_OK);
  EXPECT(tqai_cache_append(cache, &keys, &values, NULL) == TQAI_OK);
  EXPECT(tqai_cache_left_out(cache, 0, NULL, 0, &count) == TQAI_OK && count == 0);
  EXPECT(tqai_cache_leave_out(cache, hidden, 6) == TQAI_OK);
  tqai_memory_init(&memory, sizeof(memory));
  EXPECT(tqai_cache_get_memory(cache, &memory) == TQAI_OK && memory.tokens == 17);
  memset(spans, 0, sizeof(spans));
  EXPECT(tqai_cache_left_out(cache, 0, spans, 1, &count) == TQAI_OK && count == 2);
  EXPECT(spans[0].first == 15 && spans[0].count == 2 && spans[1].count == 0);
  EXPECT(tqai_cache_left_out(cache, 0, spans, 2, &count) == TQAI_OK && count == 2);
  EXPECT(spans[1].first == 18 && spans[1].count == 1);
  EXPECT_ERROR(tqai_cache_left_out(cache, 1, spans, 2, &count), TQAI_INDEX_ERROR, "row 1");
  EXPECT_ERROR(tqai_cache_left_out(cache, 0, NULL, 2, &count), TQAI_VALUE_ERROR, "spans is NULL");
  EXPECT_ERROR(tqai_cache_left_out(cache, 0, spans, 2, NULL), TQAI_VALUE_ERROR, "count is NULL");
  EXPECT_ERROR(tqai_cache_left_out(NULL, 0, spans, 2, &count), TQAI_VALUE_ERROR, "cache is NULL");
  EXPECT_ERROR(tqai_cache_leave_out(cache, NULL, 6), TQAI_VALUE_ERROR, "hidden is NULL");
  EXPECT_ERROR(tqai_cache_leave_out(NULL, hidden, 6), TQAI_VALUE_ERROR, "cache is NULL");
  tqai_cache_destroy(cache);
}

static void add_all(tqai_key_moments* moments) {
  int head;
  for (head = 0; head < kHeads; ++head) {
    const float* keys = g_keys + head * kTokens * kDim;
    const float* queries = g_values + head * kTokens * kDim;
    EXPECT(tqai_key_moments_add_keys(moments, head, keys, kTokens, NULL, 0) == TQAI_OK);
    EXPECT(tqai_key_moments_add_queries(moments, head, queries, kTokens, NULL, 0) == TQAI_OK);
  }
}

static void test_key_moments(void) {
  const tqai_cache_options o = options();
  static double square[kDim * kDim];
  const int64_t positions[3] = {7, 8, 9};
  tqai_key_moments* moments = NULL;
  tqai_key_basis* basis = NULL;
  int i;
  for (i = 0; i < kDim; ++i) square[i * kDim + i] = 1.0;
  EXPECT_ERROR(tqai_key_moments_create(NULL, &moments), TQAI_VALUE_ERROR, "options is NULL");
  EXPECT_ERROR(tqai_key_moments_create(&o, NULL), TQAI_VALUE_ERROR, "moments is NULL");
  EXPECT(tqai_key_moments_create(&o, &moments) == TQAI_OK);
  EXPECT_ERROR(tqai_key_basis_learn(moments, 2, 64, &basis), TQAI_VALUE_ERROR, "");
  EXPECT(basis == NULL);
  EXPECT_ERROR(tqai_key_moments_add_keys(moments, 0, NULL, 3, NULL, 0), TQAI_VALUE_ERROR,
               "keys is NULL");
  EXPECT_ERROR(tqai_key_moments_add_keys(moments, 0, g_keys, SIZE_MAX, NULL, 0), TQAI_VALUE_ERROR,
               "fit into no memory");
  EXPECT_ERROR(tqai_key_moments_add_queries(moments, 0, g_keys, 3, NULL, 3), TQAI_VALUE_ERROR,
               "positions is NULL");
  EXPECT_ERROR(tqai_key_moments_add_queries(moments, 0, g_keys, 3, positions, 2), TQAI_VALUE_ERROR,
               "2 positions");
  EXPECT_ERROR(tqai_key_moments_add_keys(moments, kHeads, g_keys, 3, NULL, 0), TQAI_INDEX_ERROR,
               "2");
  EXPECT_ERROR(tqai_key_moments_add_keys(NULL, 0, g_keys, 3, NULL, 0), TQAI_VALUE_ERROR,
               "moments is NULL");
  EXPECT_ERROR(tqai_key_moments_add_prior(moments, 0, square, NULL, 3.0), TQAI_VALUE_ERROR,
               "queries is NULL");
  EXPECT(tqai_key_moments_add_keys(moments, 0, g_keys, 3, positions, 3) == TQAI_OK);
  EXPECT(tqai_key_moments_add_prior(moments, 0, square, square, 3.0) == TQAI_OK);
  EXPECT(tqai_key_moments_add_prior(moments, 1, square, square, 3.0) == TQAI_OK);
  EXPECT(tqai_key_basis_learn(moments, 2, 64, &basis) == TQAI_OK && basis != NULL);
  tqai_key_basis_destroy(basis);
  tqai_key_basis_destroy(NULL);
  tqai_key_moments_destroy(moments);
  tqai_key_moments_destroy(NULL);
}

static void test_key_basis(const char* path) {
  tqai_cache_options o = options();
  const tqai_tensor keys = tensor(g_keys, kHeads, kTokens, kTokens);
  const tqai_tensor values = tensor(g_values, kHeads, kTokens, kTokens);
  tqai_key_moments* moments = NULL;
  tqai_key_basis* basis = NULL;
  tqai_key_basis* same = NULL;
  const tqai_key_basis* known[1];
  const tqai_cache* layers[1];
  tqai_cache* cache = NULL;
  tqai_cache* back = NULL;
  tqai_file* file = NULL;
  tqai_load_options how;
  tqai_memory memory;
  size_t size = 0;
  size_t whole = 0;
  uint64_t id = 0;
  uint64_t same_id = 1;
  unsigned char* bytes;
  EXPECT(tqai_key_moments_create(&o, &moments) == TQAI_OK);
  add_all(moments);
  EXPECT_ERROR(tqai_key_basis_learn(moments, 9, 64, &basis), TQAI_VALUE_ERROR, "9");
  EXPECT_ERROR(tqai_key_basis_learn(NULL, 4, 64, &basis), TQAI_VALUE_ERROR, "moments is NULL");
  EXPECT_ERROR(tqai_key_basis_learn(moments, 4, 64, NULL), TQAI_VALUE_ERROR, "basis is NULL");
  EXPECT(tqai_key_basis_learn(moments, 4, 64, &basis) == TQAI_OK);
  tqai_key_moments_destroy(moments);

  EXPECT(tqai_key_basis_serialized_bytes(basis, &size) == TQAI_OK && size > 2 * kDim * kDim);
  bytes = malloc(size);
  if (bytes == NULL) exit(1);
  EXPECT_ERROR(tqai_key_basis_serialize(basis, bytes, size - 1), TQAI_VALUE_ERROR, "needed: ");
  EXPECT(tqai_key_basis_serialize(basis, bytes, size) == TQAI_OK);
  EXPECT_ERROR(tqai_key_basis_deserialize(bytes, size - 1, &same), TQAI_VALUE_ERROR, "bytes");
  EXPECT(tqai_key_basis_deserialize(bytes, size, &same) == TQAI_OK);
  EXPECT(tqai_key_basis_id(basis, &id) == TQAI_OK && tqai_key_basis_id(same, &same_id) == TQAI_OK);
  EXPECT(id == same_id);
  EXPECT_ERROR(tqai_key_basis_id(NULL, &id), TQAI_VALUE_ERROR, "basis is NULL");
  free(bytes);

  /* A cache shares the basis, whose handle may end first. */
  o.key_basis = basis;
  EXPECT(tqai_cache_create(&o, &cache) == TQAI_OK);
  tqai_key_basis_destroy(basis);
  EXPECT(tqai_cache_append(cache, &keys, &values, NULL) == TQAI_OK);
  EXPECT(tqai_cache_seal(cache, NULL) == TQAI_OK);
  tqai_memory_init(&memory, sizeof(memory));
  EXPECT(tqai_cache_get_memory(cache, &memory) == TQAI_OK);
  EXPECT(memory.packed_tokens > 0 && memory.basis_bytes > 0);

  /* Bytes with the id need the basis, those with its matrices do not. */
  EXPECT(tqai_cache_serialized_bytes(cache, &size) == TQAI_OK);
  EXPECT(tqai_cache_serialized_bytes_as(cache, TQAI_BASIS_MATRICES, &whole) == TQAI_OK);
  EXPECT(whole > size);
  EXPECT_ERROR(tqai_cache_serialized_bytes_as(cache, 2, &whole), TQAI_VALUE_ERROR, "basis = 2");
  bytes = malloc(whole);
  if (bytes == NULL) exit(1);
  EXPECT(tqai_cache_serialize(cache, bytes, size) == TQAI_OK);
  EXPECT_ERROR(tqai_cache_deserialize(bytes, size, NULL, &back), TQAI_VALUE_ERROR, "basis");
  known[0] = NULL;
  EXPECT_ERROR(tqai_cache_deserialize_with(bytes, size, NULL, known, 1, &back), TQAI_VALUE_ERROR,
               "a key basis is NULL");
  known[0] = same;
  EXPECT(tqai_cache_deserialize_with(bytes, size, NULL, known, 1, &back) == TQAI_OK);
  EXPECT(tokens_of(back) == kTokens);
  tqai_cache_destroy(back);
  EXPECT_ERROR(tqai_cache_serialize_as(cache, TQAI_BASIS_MATRICES, bytes, size), TQAI_VALUE_ERROR,
               "needed: ");
  EXPECT(tqai_cache_serialize_as(cache, TQAI_BASIS_MATRICES, bytes, whole) == TQAI_OK);
  EXPECT(tqai_cache_deserialize(bytes, whole, NULL, &back) == TQAI_OK);
  tqai_cache_destroy(back);
  free(bytes);

  layers[0] = cache;
  EXPECT_ERROR(tqai_save_as(path, layers, 1, NULL, -1), TQAI_VALUE_ERROR, "basis = -1");
  EXPECT(tqai_save_as(path, layers, 1, NULL, TQAI_BASIS_MATRICES) == TQAI_OK);
  EXPECT(tqai_file_open(path, &file) == TQAI_OK);
  EXPECT(tqai_file_load(file, 0, NULL, &back) == TQAI_OK);
  tqai_cache_destroy(back);
  tqai_file_destroy(file);
  EXPECT(tqai_save(path, layers, 1, NULL) == TQAI_OK);
  EXPECT(tqai_file_open(path, &file) == TQAI_OK);
  EXPECT_ERROR(tqai_file_load(file, 0, NULL, &back), TQAI_VALUE_ERROR, "basis");
  tqai_load_options_init(&how, sizeof(how));
  how.key_bases = known;
  how.key_basis_count = 1;
  EXPECT(tqai_file_load(file, 0, &how, &back) == TQAI_OK);
  tqai_cache_destroy(back);
  tqai_file_destroy(file);
  tqai_cache_destroy(cache);
  tqai_key_basis_destroy(same);
  remove(path);
}

static void test_bytes(void) {
  tqai_cache* cache = filled();
  tqai_cache* back = NULL;
  size_t size = 0;
  unsigned char* bytes;
  unsigned char* again;
  EXPECT(tqai_cache_serialized_bytes(cache, &size) == TQAI_OK && size > 1000);
  bytes = malloc(size);
  again = malloc(size);
  if (bytes == NULL || again == NULL) exit(1);
  EXPECT_ERROR(tqai_cache_serialize(cache, bytes, size - 1), TQAI_VALUE_ERROR, "needed: ");
  EXPECT_ERROR(tqai_cache_serialize(cache, NULL, size), TQAI_VALUE_ERROR, "to is NULL");
  EXPECT_ERROR(tqai_cache_serialize(NULL, bytes, size), TQAI_VALUE_ERROR, "cache is NULL");
  EXPECT_ERROR(tqai_cache_serialized_bytes(NULL, &size), TQAI_VALUE_ERROR, "cache is NULL");
  EXPECT_ERROR(tqai_cache_serialized_bytes(cache, NULL), TQAI_VALUE_ERROR, "bytes is NULL");
  EXPECT(tqai_cache_serialize(cache, bytes, size) == TQAI_OK);
  EXPECT(tqai_cache_deserialize(bytes, size, NULL, &back) == TQAI_OK);
  EXPECT(tqai_cache_serialize(back, again, size) == TQAI_OK);
  EXPECT(memcmp(bytes, again, size) == 0);
  tqai_cache_destroy(back);
  EXPECT(tqai_cache_deserialize(bytes, size, "scalar", &back) == TQAI_OK);
  tqai_cache_destroy(back);
  EXPECT_ERROR(tqai_cache_deserialize(bytes, size - 1, NULL, &back), TQAI_VALUE_ERROR, "too early");
  EXPECT(back == NULL);
  EXPECT_ERROR(tqai_cache_deserialize(NULL, size, NULL, &back), TQAI_VALUE_ERROR, "bytes is NULL");
  EXPECT_ERROR(tqai_cache_deserialize(NULL, 0, NULL, &back), TQAI_VALUE_ERROR, "too early");
  EXPECT_ERROR(tqai_cache_deserialize(bytes, size, "x", &back), TQAI_VALUE_ERROR, "x");
  EXPECT_ERROR(tqai_cache_deserialize(bytes, size, NULL, NULL), TQAI_VALUE_ERROR, "cache is NULL");
  free(bytes);
  free(again);
  tqai_cache_destroy(cache);
}

static void test_files(const char* path) {
  tqai_cache* cache = filled();
  const tqai_cache* layers[2];
  tqai_cache* back = NULL;
  tqai_file* file = NULL;
  tqai_load_options settings;
  tqai_memory memory;
  const char* header = NULL;
  int32_t holds = -1;
  layers[0] = cache;
  layers[1] = NULL;
  EXPECT_ERROR(tqai_save(path, layers, 2, NULL), TQAI_VALUE_ERROR, "a layer is NULL");
  layers[1] = cache;
  EXPECT_ERROR(tqai_save(NULL, layers, 2, NULL), TQAI_VALUE_ERROR, "path is NULL");
  EXPECT_ERROR(tqai_save(path, NULL, 2, NULL), TQAI_VALUE_ERROR, "layers is NULL");
  EXPECT_ERROR(tqai_save(path, layers, 2, "[]"), TQAI_VALUE_ERROR, "JSON object");
  EXPECT_ERROR(tqai_save("/nowhere/at/all", layers, 2, NULL), TQAI_FILE_ERROR, "/nowhere/at/all");
  EXPECT(tqai_save(path, layers, 2, "{\"model\": \"mine\"}") == TQAI_OK);
  EXPECT_ERROR(tqai_file_open("/nowhere/at/all", &file), TQAI_FILE_ERROR, "could not be read");
  EXPECT(file == NULL);
  EXPECT_ERROR(tqai_file_open(NULL, &file), TQAI_VALUE_ERROR, "path is NULL");
  EXPECT_ERROR(tqai_file_open(path, NULL), TQAI_VALUE_ERROR, "file is NULL");
  EXPECT(tqai_file_open(path, &file) == TQAI_OK);
  EXPECT(tqai_file_header(file, &header) == TQAI_OK);
  EXPECT(strcmp(header, "{\"model\": \"mine\"}") == 0);
  EXPECT_ERROR(tqai_file_header(NULL, &header), TQAI_VALUE_ERROR, "file is NULL");
  EXPECT_ERROR(tqai_file_header(file, NULL), TQAI_VALUE_ERROR, "header is NULL");
  EXPECT(tqai_file_holds(file, 1, &holds) == TQAI_OK && holds == 1);
  EXPECT(tqai_file_holds(file, 2, &holds) == TQAI_OK && holds == 0);
  EXPECT_ERROR(tqai_file_holds(NULL, 1, &holds), TQAI_VALUE_ERROR, "file is NULL");
  EXPECT_ERROR(tqai_file_holds(file, 1, NULL), TQAI_VALUE_ERROR, "holds is NULL");
  EXPECT_ERROR(tqai_file_load(file, 2, NULL, &back), TQAI_INDEX_ERROR, "layers.2.packed");
  EXPECT_ERROR(tqai_file_load(file, 0, NULL, NULL), TQAI_VALUE_ERROR, "cache is NULL");
  EXPECT_ERROR(tqai_file_load(NULL, 0, NULL, &back), TQAI_VALUE_ERROR, "file is NULL");
  tqai_load_options_init(&settings, sizeof(settings));
  EXPECT(settings.verify == 1 && settings.mapped == 0);
  settings.level = "x";
  EXPECT_ERROR(tqai_file_load(file, 0, &settings, &back), TQAI_VALUE_ERROR, "x");
  settings.level = NULL;
  settings.mapped = 1;
  EXPECT(tqai_file_load(file, 0, &settings, &back) == TQAI_OK);
  tqai_file_destroy(file);
  tqai_file_destroy(NULL);
  tqai_memory_init(&memory, sizeof(memory));
  EXPECT(tqai_cache_get_memory(back, &memory) == TQAI_OK);
  EXPECT(memory.mapped_bytes > 0 && memory.packed_bytes == 0 && tokens_of(back) == kTokens);
  tqai_cache_destroy(back);
  tqai_cache_destroy(cache);
  remove(path);
}

static void test_codebooks(void) {
  const tqai_codebook* book = NULL;
  const float* numbers = NULL;
  const int8_t* levels = NULL;
  size_t count = 0;
  float step = -1.0F;
  double distortion = 0.0;
  EXPECT(tqai_codebook_get(kDim, 3, TQAI_GRID_INT8, &book) == TQAI_OK);
  EXPECT(tqai_codebook_centroids(book, &numbers, &count) == TQAI_OK && count == 8);
  EXPECT(tqai_codebook_levels(book, &levels, &count, &step) == TQAI_OK && count == 8);
  EXPECT(fabsf((float)levels[7] * step - numbers[7]) < 1e-6F);
  EXPECT(tqai_codebook_boundaries(book, &numbers, &count) == TQAI_OK && count == 7);
  EXPECT(tqai_codebook_distortion(book, &distortion) == TQAI_OK);
  EXPECT(distortion > 0.0 && distortion < 0.1);
  EXPECT_ERROR(tqai_codebook_get(7, 3, 0, &book), TQAI_VALUE_ERROR, "7");
  EXPECT(book == NULL);
  EXPECT_ERROR(tqai_codebook_get(kDim, 3, 2, &book), TQAI_VALUE_ERROR, "grid = 2");
  EXPECT_ERROR(tqai_codebook_get(kDim, 3, 0, NULL), TQAI_VALUE_ERROR, "codebook is NULL");
  EXPECT_ERROR(tqai_codebook_centroids(NULL, &numbers, &count), TQAI_VALUE_ERROR, "is NULL");
  EXPECT_ERROR(tqai_codebook_boundaries(NULL, &numbers, &count), TQAI_VALUE_ERROR, "is NULL");
  EXPECT_ERROR(tqai_codebook_levels(NULL, &levels, &count, &step), TQAI_VALUE_ERROR, "is NULL");
  EXPECT_ERROR(tqai_codebook_distortion(NULL, &distortion), TQAI_VALUE_ERROR, "is NULL");
  EXPECT(tqai_codebook_get(kDim, 3, TQAI_GRID_EXACT, &book) == TQAI_OK);
  EXPECT(tqai_codebook_levels(book, &levels, &count, &step) == TQAI_OK && count == 0);
  EXPECT_ERROR(tqai_codebook_centroids(book, NULL, &count), TQAI_VALUE_ERROR, "centroids is NULL");
  EXPECT_ERROR(tqai_codebook_centroids(book, &numbers, NULL), TQAI_VALUE_ERROR, "count is NULL");
  EXPECT_ERROR(tqai_codebook_boundaries(book, NULL, &count), TQAI_VALUE_ERROR, "boundaries is");
  EXPECT_ERROR(tqai_codebook_boundaries(book, &numbers, NULL), TQAI_VALUE_ERROR, "count is NULL");
  EXPECT_ERROR(tqai_codebook_levels(book, NULL, &count, &step), TQAI_VALUE_ERROR, "levels is");
  EXPECT_ERROR(tqai_codebook_levels(book, &levels, NULL, &step), TQAI_VALUE_ERROR, "count is");
  EXPECT_ERROR(tqai_codebook_levels(book, &levels, &count, NULL), TQAI_VALUE_ERROR, "step is");
  EXPECT_ERROR(tqai_codebook_distortion(book, NULL), TQAI_VALUE_ERROR, "distortion is NULL");
}

static void test_quantizers(void) {
  int unbiased;
  tqai_quantizer* quantizer = NULL;
  tqai_quantizer_options o;
  for (unbiased = 0; unbiased < 2; ++unbiased) {
    size_t code_bytes = 0;
    int32_t norms = 0;
    uint8_t codes[8 * kDim];
    uint16_t fp16[16];
    float back[8 * kDim];
    float products[8 * 8];
    double error = 0.0;
    double squares = 0.0;
    int i;
    tqai_quantizer_options_init(&o, sizeof(o));
    o.head_dim = kDim;
    o.bits = 8;
    o.unbiased = unbiased;
    EXPECT(tqai_quantizer_create(&o, &quantizer) == TQAI_OK);
    EXPECT(tqai_quantizer_sizes(quantizer, &code_bytes, &norms) == TQAI_OK);
    EXPECT(code_bytes == kDim && norms == 1 + unbiased);
    EXPECT(tqai_quantizer_encode(quantizer, g_keys, 8, codes, fp16) == TQAI_OK);
    EXPECT(tqai_quantizer_decode(quantizer, codes, fp16, 8, back) == TQAI_OK);
    EXPECT(tqai_quantizer_inner_products(quantizer, g_keys, 8, codes, fp16, 8, products) ==
           TQAI_OK);
    for (i = 0; i < 8 * kDim; ++i) {
      error += ((double)back[i] - (double)g_keys[i]) * ((double)back[i] - (double)g_keys[i]);
      squares += (double)g_keys[i] * (double)g_keys[i];
    }
    EXPECT(error < 1e-3 * squares);
    EXPECT(products[0] > 0.0F);
    EXPECT_ERROR(tqai_quantizer_encode(quantizer, NULL, 8, codes, fp16), TQAI_VALUE_ERROR, "");
    EXPECT_ERROR(tqai_quantizer_encode(quantizer, g_keys, -1, codes, fp16), TQAI_VALUE_ERROR, "-1");
    EXPECT_ERROR(tqai_quantizer_encode(quantizer, g_keys, INT64_MAX, codes, fp16), TQAI_VALUE_ERROR,
                 "rows = 9223372036854775807");
    EXPECT_ERROR(tqai_quantizer_decode(quantizer, codes, fp16, INT64_MAX / kDim, back),
                 TQAI_VALUE_ERROR, "rows = ");
    EXPECT_ERROR(tqai_quantizer_inner_products(quantizer, g_keys, INT64_MAX, codes, fp16, 8,
                                               products),
                 TQAI_VALUE_ERROR, "query_rows = 9223372036854775807");
    EXPECT_ERROR(tqai_quantizer_decode(quantizer, NULL, fp16, 8, back), TQAI_VALUE_ERROR, "");
    EXPECT_ERROR(tqai_quantizer_inner_products(quantizer, NULL, 8, codes, fp16, 8, products),
                 TQAI_VALUE_ERROR, "");
    EXPECT_ERROR(tqai_quantizer_sizes(quantizer, NULL, &norms), TQAI_VALUE_ERROR, "code_bytes is");
    EXPECT_ERROR(tqai_quantizer_sizes(quantizer, &code_bytes, NULL), TQAI_VALUE_ERROR, "norms is");
    EXPECT_ERROR(tqai_quantizer_sizes(NULL, &code_bytes, &norms), TQAI_VALUE_ERROR, "quantizer is");
    EXPECT_ERROR(tqai_quantizer_encode(NULL, g_keys, 8, codes, fp16), TQAI_VALUE_ERROR, "is NULL");
    EXPECT_ERROR(tqai_quantizer_decode(NULL, codes, fp16, 8, back), TQAI_VALUE_ERROR, "is NULL");
    EXPECT_ERROR(tqai_quantizer_inner_products(NULL, g_keys, 8, codes, fp16, 8, products),
                 TQAI_VALUE_ERROR, "is NULL");
    tqai_quantizer_destroy(quantizer);
  }
  tqai_quantizer_destroy(NULL);
  EXPECT_ERROR(tqai_quantizer_create(NULL, &quantizer), TQAI_VALUE_ERROR, "options is NULL");
  EXPECT_ERROR(tqai_quantizer_create(&o, NULL), TQAI_VALUE_ERROR, "quantizer is NULL");
  o.bits = 0;
  EXPECT_ERROR(tqai_quantizer_create(&o, &quantizer), TQAI_VALUE_ERROR, "bits");
  o.rotation = 3;
  EXPECT_ERROR(tqai_quantizer_create(&o, &quantizer), TQAI_VALUE_ERROR, "rotation = 3");
  o.rotation = 0;
  o.grid = 2;
  EXPECT_ERROR(tqai_quantizer_create(&o, &quantizer), TQAI_VALUE_ERROR, "grid = 2");
  EXPECT(quantizer == NULL);
}

/* An executor of one thread, which counts what it is handed. */
static void count_and_run(void* user, int64_t count, tqai_work work, void* state) {
  int64_t i;
  *(int64_t*)user += count;
  for (i = count - 1; i >= 0; --i) work(state, i);
}

static void test_resources(void) {
  static float big_keys[1000 * 4 * 64], whole[4 * 64], split[4 * 64];
  float logs[4], others[4];
  tqai_cache_options o;
  tqai_cache *cache = NULL, *copy = NULL;
  tqai_resources resources;
  tqai_workspace* workspace = NULL;
  tqai_attend_options settings;
  tqai_tensor keys = {big_keys, TQAI_F32, {1, 4, 1000, 64}, {0, 64000, 64, 1}};
  const tqai_tensor q = {big_keys, TQAI_F32, {1, 4, 1, 64}, {0, 64, 64, 1}};
  tqai_output out = {whole, TQAI_F32, {1, 1, 4, 64}, {256, 256, 64, 1}};
  tqai_output sums = {logs, TQAI_F32, {1, 1, 4, 1}, {4, 4, 1, 1}};
  int64_t handed = 0, held = -1;
  size_t i, bytes;
  for (i = 0; i < sizeof(big_keys) / sizeof(float); ++i) big_keys[i] = g_keys[i % kNumbers];
  tqai_cache_options_init(&o, sizeof(o));
  o.kv_heads = 4;
  o.head_dim = 64;
  EXPECT(tqai_cache_create(&o, &cache) == TQAI_OK);
  EXPECT(tqai_workspace_create(&workspace) == TQAI_OK && tqai_workspace_bytes(workspace) == 0);
  EXPECT(tqai_workspace_bytes(NULL) == 0);
  EXPECT_ERROR(tqai_workspace_create(NULL), TQAI_VALUE_ERROR, "workspace is NULL");
  tqai_resources_init(NULL, 8);
  tqai_resources_init(&resources, sizeof(resources));
  resources.threads = 2;
  resources.parallel_for = count_and_run;
  resources.user = &handed;
  resources.workspace = workspace;
  EXPECT(tqai_cache_append_with(cache, &keys, &keys, NULL, &resources) == TQAI_OK);
  EXPECT(tqai_cache_copy(cache, &copy) == TQAI_OK);
  EXPECT(tqai_cache_seal_with(cache, &held, &resources) == TQAI_OK && held == 0);
  EXPECT(handed > 0);
  EXPECT(tqai_cache_seal(copy, NULL) == TQAI_OK);
  tqai_attend_options_init(&settings, sizeof(settings));
  settings.log_sum_exp = &sums;
  EXPECT(tqai_cache_attend(copy, &q, &out, &settings) == TQAI_OK);
  settings.resources = &resources;
  out.data = split;
  sums.data = others;
  EXPECT(tqai_cache_attend(cache, &q, &out, &settings) == TQAI_OK);
  EXPECT(memcmp(whole, split, sizeof(whole)) == 0);
  EXPECT(memcmp(logs, others, sizeof(logs)) == 0);
  EXPECT(logs[0] > 0.0F && logs[0] < 100.0F);
  bytes = tqai_workspace_bytes(workspace);
  EXPECT(bytes > 0);
  EXPECT(tqai_cache_attend(cache, &q, &out, &settings) == TQAI_OK);
  EXPECT(tqai_workspace_bytes(workspace) == bytes);
  resources.threads = -1;
  EXPECT_ERROR(tqai_cache_attend(cache, &q, &out, &settings), TQAI_VALUE_ERROR, "threads = -1");
  EXPECT_ERROR(tqai_cache_seal_with(cache, NULL, &resources), TQAI_VALUE_ERROR, "threads = -1");
  resources.size = 0;
  EXPECT_ERROR(tqai_cache_attend(cache, &q, &out, &settings), TQAI_VALUE_ERROR, "resources->size");
  settings.resources = NULL;
  sums.shape[2] = 3;
  EXPECT_ERROR(tqai_cache_attend(cache, &q, &out, &settings), TQAI_VALUE_ERROR, "log_sum_exp");
  tqai_limit_memory(1);
  EXPECT_ERROR(tqai_cache_append(cache, &keys, &keys, NULL), TQAI_NO_MEMORY,
               "limit_memory allows 1");
  tqai_limit_memory(0);
  EXPECT(tokens_of(cache) == 1000);
  tqai_workspace_destroy(workspace);
  tqai_workspace_destroy(NULL);
  tqai_cache_destroy(cache);
  tqai_cache_destroy(copy);
}

/* Calls on lists: to the bit what each cache gets alone, and nothing where one of them is refused.
 */
static void test_sequences(void) {
  enum { kFirst = 3, kSecond = 1, kAll = kFirst + kSecond };
  tqai_cache* caches[2];
  tqai_cache* alone[2];
  const tqai_cache* readers[2];
  const int64_t counts[2] = {kFirst, kSecond};
  int64_t lengths[2] = {kTokens, kTokens};
  const int64_t starts[2] = {0, kFirst};
  float whole[kAll * 2 * kHeads * kDim];
  float each[kAll * 2 * kHeads * kDim];
  tqai_output outputs[2];
  tqai_output packed_output = output(whole, kAll, 2 * kHeads);
  tqai_tensor keys[2];
  tqai_tensor values[2];
  tqai_tensor queries[2];
  const tqai_tensor all_keys = tensor(g_keys, kHeads, kAll, kTokens);
  const tqai_tensor all_values = tensor(g_values, kHeads, kAll, kTokens);
  const tqai_tensor all_queries = tensor(g_values, 2 * kHeads, kAll, kAll);
  tqai_attend_options settings;
  const tqai_attend_options* options_of[2] = {NULL, &settings};
  tqai_resources resources;
  int64_t held = -1;
  int i;
  for (i = 0; i < 2; ++i) {
    caches[i] = filled();
    readers[i] = caches[i];
    EXPECT(tqai_cache_copy(caches[i], &alone[i]) == TQAI_OK);
    keys[i] = tensor(g_keys + starts[i] * kDim, kHeads, counts[i], kTokens);
    values[i] = tensor(g_values + starts[i] * kDim, kHeads, counts[i], kTokens);
    queries[i] = tensor(g_values + starts[i] * kDim, 2 * kHeads, counts[i], kAll);
    outputs[i] = output(each + starts[i] * 2 * kHeads * kDim, counts[i], 2 * kHeads);
    EXPECT(tqai_cache_append(alone[i], &keys[i], &values[i], NULL) == TQAI_OK);
    EXPECT(tqai_cache_attend(alone[i], &queries[i], &outputs[i], NULL) == TQAI_OK);
  }
  tqai_attend_options_init(&settings, sizeof(settings));
  tqai_resources_init(&resources, sizeof(resources));
  resources.threads = 1;
  EXPECT(tqai_caches_append_packed(caches, 2, counts, &all_keys, &all_values, NULL, &resources) ==
         TQAI_OK);
  EXPECT(tokens_of(caches[0]) == kTokens + kFirst && tokens_of(caches[1]) == kTokens + kSecond);
  EXPECT(tqai_caches_attend_packed(readers, 2, counts, &all_queries, &packed_output, NULL) ==
         TQAI_OK);
  EXPECT(memcmp(whole, each, sizeof(whole)) == 0);
  /* The same with tensors of each one's own. */
  EXPECT(tqai_caches_crop(caches, 2, lengths) == TQAI_OK);
  EXPECT(tokens_of(caches[0]) == kTokens && tokens_of(caches[1]) == kTokens);
  EXPECT(tqai_caches_append(caches, 2, keys, values, NULL, &resources) == TQAI_OK);
  for (i = 0; i < 2; ++i) outputs[i].data = whole + starts[i] * 2 * kHeads * kDim;
  memset(whole, 0, sizeof(whole));
  EXPECT(tqai_caches_attend(readers, 2, queries, outputs, options_of, &resources) == TQAI_OK);
  EXPECT(memcmp(whole, each, sizeof(whole)) == 0);
  EXPECT(tqai_caches_attend(readers, 2, queries, outputs, NULL, NULL) == TQAI_OK);
  EXPECT(tqai_caches_seal(caches, 2, &held, NULL) == TQAI_OK && held == 0);
  EXPECT(tqai_caches_seal(caches, 0, NULL, NULL) == TQAI_OK);

  settings.resources = &resources;
  EXPECT_ERROR(tqai_caches_attend(readers, 2, queries, outputs, options_of, NULL), TQAI_VALUE_ERROR,
               "options[1]->resources is set");
  lengths[1] = 1000;
  EXPECT_ERROR(tqai_caches_crop(caches, 2, lengths), TQAI_VALUE_ERROR,
               "sequence 1 of 2: crop to 1000");
  EXPECT_ERROR(tqai_caches_crop(NULL, 2, lengths), TQAI_VALUE_ERROR, "caches is NULL");
  EXPECT_ERROR(tqai_caches_crop(caches, 2, NULL), TQAI_VALUE_ERROR, "tokens is NULL");
  values[1].shape[1] = 1;
  EXPECT_ERROR(tqai_caches_append(caches, 2, keys, values, NULL, NULL), TQAI_VALUE_ERROR,
               "sequence 1 of 2: values");
  EXPECT_ERROR(tqai_caches_append(caches, 2, keys, NULL, NULL, NULL), TQAI_VALUE_ERROR,
               "values is NULL");
  EXPECT_ERROR(tqai_caches_append_packed(caches, 2, NULL, &all_keys, &all_values, NULL, NULL),
               TQAI_VALUE_ERROR, "tokens is NULL");
  EXPECT_ERROR(tqai_caches_append_packed(caches, 1, counts, &all_keys, &all_values, NULL, NULL),
               TQAI_VALUE_ERROR, "the sum of the counts");
  tqai_cache_destroy(caches[1]);
  caches[1] = NULL;
  EXPECT_ERROR(tqai_caches_seal(caches, 2, NULL, NULL), TQAI_VALUE_ERROR,
               "one of the caches is NULL");
  caches[1] = caches[0];
  EXPECT_ERROR(tqai_caches_seal(caches, 2, NULL, NULL), TQAI_VALUE_ERROR, "comes twice");
  EXPECT(tokens_of(caches[0]) == kTokens + kFirst);
  tqai_cache_destroy(caches[0]);
  for (i = 0; i < 2; ++i) tqai_cache_destroy(alone[i]);
}

/* Tiles as they lie in memory, which a copy keeps, and memory for more of them. */
static void test_blocks(void) {
  tqai_cache* cache = filled();
  tqai_cache* copy = NULL;
  tqai_block blocks[4];
  tqai_block more;
  tqai_centre centre;
  tqai_memory memory;
  size_t count = 0;
  int64_t packed = 0;
  int i;
  for (i = 0; i < 4; ++i) tqai_block_init(&blocks[i], sizeof(blocks[i]));
  tqai_centre_init(&centre, sizeof(centre));
  EXPECT(tqai_cache_packed_tokens(cache, 0, &packed) == TQAI_OK);
  EXPECT(tqai_cache_sealed_blocks(cache, 0, NULL, 0, &count) == TQAI_OK);
  EXPECT((int64_t)count * 64 == packed && count == 2);
  EXPECT(tqai_cache_sealed_blocks(cache, 0, blocks, 4, &count) == TQAI_OK && count == 2);
  EXPECT(blocks[0].first_token == 4 && blocks[1].first_token == 68 && blocks[2].tiles == NULL);
  EXPECT(blocks[0].tokens == 64 && blocks[0].positions == NULL && blocks[0].first_position == 4);
  EXPECT(blocks[0].value_codes == kDim * 4 * 8 && blocks[0].tile_bytes == 2 * kDim * 4 * 8 + 256);
  EXPECT(blocks[0].key_norms == blocks[0].tile_bytes - 256 &&
         blocks[0].value_norms == blocks[0].tile_bytes - 128);
  EXPECT(tqai_cache_copy(cache, &copy) == TQAI_OK);
  tqai_cache_destroy(cache);
  tqai_block_init(&more, sizeof(more));
  EXPECT(tqai_cache_sealed_blocks(copy, 0, &more, 1, &count) == TQAI_OK && count == 2);
  EXPECT(more.tiles == blocks[0].tiles && ((const uint8_t*)more.tiles)[more.tile_bytes - 1] < 0x7c);
  EXPECT(tqai_cache_centre(copy, 0, blocks[0].centre_set, 1, &centre) == TQAI_OK);
  EXPECT(centre.constant != NULL && centre.pairs == 0 && centre.real == NULL);
  EXPECT(centre.kind == TQAI_CENTERING_NONE || centre.kind == TQAI_CENTERING_MEAN);
  EXPECT_ERROR(tqai_cache_centre(copy, 0, 9, 1, &centre), TQAI_INDEX_ERROR, "centre set 9");
  EXPECT_ERROR(tqai_cache_sealed_blocks(copy, 1, NULL, 0, &count), TQAI_INDEX_ERROR, "row 1");
  EXPECT_ERROR(tqai_cache_sealed_blocks(copy, 0, NULL, 1, &count), TQAI_VALUE_ERROR,
               "blocks is NULL");
  more.size = 1;
  EXPECT_ERROR(tqai_cache_sealed_blocks(copy, 0, &more, 1, &count), TQAI_VALUE_ERROR, "size = 1");
  blocks[0].first_token = 99;
  blocks[1].size = 0;
  count = 7;
  EXPECT_ERROR(tqai_cache_sealed_blocks(copy, 0, blocks, 2, &count), TQAI_VALUE_ERROR, "size = 0");
  EXPECT(blocks[0].first_token == 99 && count == 7);
  EXPECT(tqai_cache_reserve(copy, 6400) == TQAI_OK);
  tqai_memory_init(&memory, sizeof(memory));
  EXPECT(tqai_cache_get_memory(copy, &memory) == TQAI_OK);
  EXPECT(memory.overhead_bytes > 90 * 2 * blocks[0].tile_bytes);
  EXPECT_ERROR(tqai_cache_reserve(copy, -1), TQAI_VALUE_ERROR, "reserved = -1");
  tqai_block_init(NULL, 8);
  tqai_centre_init(NULL, 8);
  tqai_cache_destroy(copy);
}

int main(int argc, char** argv) {
  size_t before;
  EXPECT(strcmp(tqai_last_error(), "") == 0);
  if (argc != 2) {
    fprintf(stderr, "usage: %s FILE, which is written and removed\n", argv[0]);
    return 2;
  }
  fill();
  before = tqai_allocated_bytes();
  test_versions();
  test_create();
  test_trellis();
  test_append();
  test_attend();
  test_resources();
  test_sequences();
  test_blocks();
  test_memory_of_tensors();
  test_gather();
  test_rows();
  test_padding();
  test_leave_out();
  test_key_moments();
  test_key_basis(argv[1]);
  test_bytes();
  test_files(argv[1]);
  test_codebooks();
  test_quantizers();
  EXPECT(tqai_allocated_bytes() == before);
  if (g_failures > 0) fprintf(stderr, "%d failures\n", g_failures);
  return g_failures > 0;
}
