/* A runtime in C that keeps the keys and values of one layer compressed: a prompt, some steps of
 * decoding, and a file to go on from later. Random numbers stand for a model's. */
#include <stdio.h>
#include <stdlib.h>
#include <tqai/c_api.h>

enum { kHeads = 4, kQueryHeads = 8, kDim = 64, kPrompt = 1000, kSteps = 100 };

static void check(tqai_status status) {
  if (status == TQAI_OK) return;
  fprintf(stderr, "tqai: %s\n", tqai_last_error());
  exit(1);
}

/* [1, heads, tokens, kDim], as projections leave it: a token's heads beside one another. */
static tqai_tensor heads_of(const float* rows, int64_t heads, int64_t tokens) {
  tqai_tensor tensor = {0};
  tensor.data = rows;
  tensor.dtype = TQAI_F32;
  tensor.shape[0] = 1;
  tensor.shape[1] = heads;
  tensor.shape[2] = tokens;
  tensor.shape[3] = kDim;
  tensor.strides[1] = kDim;
  tensor.strides[2] = heads * kDim;
  tensor.strides[3] = 1;
  return tensor;
}

static void make_up(float* numbers, size_t count) {
  for (size_t i = 0; i < count; ++i) numbers[i] = (float)rand() / (float)RAND_MAX - 0.5F;
}

static void append(tqai_cache* cache, float* rows, int64_t tokens) {
  const size_t count = (size_t)(tokens * kHeads * kDim);
  make_up(rows, 2 * count);
  const tqai_tensor keys = heads_of(rows, kHeads, tokens);
  const tqai_tensor values = heads_of(rows + count, kHeads, tokens);
  check(tqai_cache_append(cache, &keys, &values, NULL));
}

int main(int argc, char** argv) {
  const char* path = argc > 1 ? argv[1] : "c_runtime.safetensors";
  if (tqai_abi_version() != TQAI_ABI_VERSION) {
    fprintf(stderr, "this program was compiled for another tqai\n");
    return 1;
  }
  tqai_cache_options options;
  tqai_cache_options_init(&options, sizeof(options));
  options.kv_heads = kHeads;
  options.head_dim = kDim;
  tqai_cache* cache = NULL;
  check(tqai_cache_create(&options, &cache));

  float* rows = malloc(sizeof(float) * 2 * kPrompt * kHeads * kDim);
  if (rows == NULL) return 1;
  append(cache, rows, kPrompt);
  float query[kQueryHeads * kDim];
  float out[kQueryHeads * kDim];
  for (int step = 0; step < kSteps; ++step) {
    append(cache, rows, 1);
    make_up(query, kQueryHeads * kDim);
    const tqai_tensor queries = heads_of(query, kQueryHeads, 1);
    const tqai_output output = {out, TQAI_F32, {1, 1, kQueryHeads, kDim}, {0, 0, kDim, 1}};
    check(tqai_cache_attend(cache, &queries, &output, NULL));
  }

  tqai_memory memory;
  tqai_memory_init(&memory, sizeof(memory));
  check(tqai_cache_get_memory(cache, &memory));
  printf("%lld tokens in %zu bytes; uncompressed %zu\n", (long long)memory.tokens,
         memory.total_bytes, memory.uncompressed_bytes);

  const tqai_cache* layers[] = {cache};
  check(tqai_save(path, layers, 1, "{\"model\": \"made up\"}"));
  tqai_cache_destroy(cache);
  tqai_file* file = NULL;
  check(tqai_file_open(path, &file));
  check(tqai_file_load(file, 0, NULL, &cache));
  tqai_file_destroy(file);
  append(cache, rows, 1); /* goes on where it was */
  tqai_cache_destroy(cache);
  free(rows);
  return 0;
}
