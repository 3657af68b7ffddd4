/** @file
 * tqai for C, and for languages that call C. What the functions do is said at length in cache.hpp,
 * key_basis.hpp, files.hpp, codebook.hpp and quantizer.hpp; here is what C adds.
 *
 * Errors: every function that can fail returns a tqai_status. tqai_last_error() says what was
 * given, what is allowed and what to do. What a function writes on success stays as it was on
 * failure, but that handles become NULL; a cache that a function failed to change is as before. No
 * C++ exception ever leaves a function, and nothing is printed.
 *
 * Ownership: handles that a `_create`, `_copy`, `_learn`, `_open`, `_load` or `_deserialize` gives
 * are the caller's, who ends them with the `_destroy` of their kind; NULL is let be. Arrays,
 * tensors and strings are borrowed for the call alone. What a function returns by `const` pointer
 * belongs to the handle that it came from.
 *
 * Threads: functions that take a `const` handle may run at the same time on one; others need the
 * handle for themselves. Different handles are independent, copies that share tiles too.
 *
 * Growth: structures whose first member is `size` are filled by their `_init`, which is given their
 * sizeof and writes that and the defaults; then their members are set. A program keeps working with
 * libraries that know more members than it did when it was compiled, and with ones that know fewer
 * as long as it leaves the others at 0.
 *
 * Units: sizes are bytes where their names say so; strides are elements; tokens, heads and rows are
 * counted from 0.
 */
#ifndef TQAI_C_API_H
#define TQAI_C_API_H

#include <stddef.h>
#include <stdint.h>

/** @cond visibility */
#if defined(TQAI_SHARED) && defined(_WIN32)
#ifdef TQAI_BUILDING
#define TQAI_C_API __declspec(dllexport)
#else
#define TQAI_C_API __declspec(dllimport)
#endif
#elif defined(TQAI_SHARED) && defined(__GNUC__)
#define TQAI_C_API __attribute__((visibility("default")))
#else
#define TQAI_C_API
#endif
/** @endcond */

#ifdef __cplusplus
extern "C" {
#endif

/** Of this header. It changes where something that exists is changed or taken away; a library whose
 * tqai_abi_version() is another cannot be used with it. */
#define TQAI_ABI_VERSION 1
/** TQAI_ABI_VERSION of the library that is linked. */
TQAI_C_API uint32_t tqai_abi_version(void);
/** Of this header. */
#define TQAI_VERSION "0.1.0"
/** Of the library that is linked. */
TQAI_C_API const char* tqai_version(void);

/** TQAI_OK, or what went wrong. */
typedef int32_t tqai_status;
enum {
  TQAI_OK = 0,
  TQAI_VALUE_ERROR = 1, /**< an argument is not allowed, or bytes are damaged */
  TQAI_INDEX_ERROR = 2, /**< a row, head, token or tensor that does not exist */
  TQAI_UNSUPPORTED = 3, /**< legal, but nothing that this build or processor can do */
  TQAI_FILE_ERROR = 4,  /**< the system refused to open, read or write a file */
  TQAI_NO_MEMORY = 5,
  TQAI_INTERNAL_ERROR = 6 /**< a mistake of the library's */
};
/** Of the last call of this thread that failed; "" before there was one. In UTF-8, at most 1023
 * bytes; valid until the thread's next call that fails. */
TQAI_C_API const char* tqai_last_error(void);

/** The kernel level that new handles take: the fastest, or what TQAI_LEVEL names. *name: "scalar",
 * "neon", "avx2", "avx_vnni", "avx512_vnni" or "avx512", for ever. */
TQAI_C_API tqai_status tqai_default_level(const char** name);

enum { TQAI_F32 = 0, TQAI_F16 = 1, TQAI_BF16 = 2, TQAI_BOOL = 3 /**< masks alone; bytes */ };
enum { TQAI_ROTATION_AUTO = 0, TQAI_ROTATION_HADAMARD = 1, TQAI_ROTATION_HAAR = 2 };
enum {
  TQAI_CENTERING_AUTO = 0,
  TQAI_CENTERING_NONE = 1,
  TQAI_CENTERING_MEAN = 2,
  TQAI_CENTERING_ROPE = 3
};
enum { TQAI_ROPE_HALF_SPLIT = 0, TQAI_ROPE_INTERLEAVED = 1 };
enum { TQAI_GRID_EXACT = 0, TQAI_GRID_INT8 = 1 };
/** What codes stand for: centroids, or levels that the codes before have a part in. */
enum { TQAI_CODES_SCALAR = 0, TQAI_CODES_TRELLIS = 1 };
/** What of a key basis a cache's bytes and files have. */
enum { TQAI_BASIS_ID = 0, TQAI_BASIS_MATRICES = 1 };

/** A borrowed 4-dimensional tensor, the last dimension contiguous. */
typedef struct tqai_tensor {
  const void* data;   /**< first element */
  int32_t dtype;      /**< TQAI_F32, TQAI_F16 or TQAI_BF16; of masks TQAI_BOOL too */
  int64_t shape[4];   /**< elements along each dimension */
  int64_t strides[4]; /**< in elements */
} tqai_tensor;

/** The same, to be written: no two elements at one address. */
typedef struct tqai_output {
  void* data;         /**< first element */
  int32_t dtype;      /**< TQAI_F32, TQAI_F16 or TQAI_BF16 */
  int64_t shape[4];   /**< elements along each dimension */
  int64_t strides[4]; /**< in elements */
} tqai_output;

/** Positions of tokens, [batch or 1, sections, tokens]. */
typedef struct tqai_positions {
  const int64_t* data; /**< first element */
  int64_t shape[3];    /**< as above */
  int64_t strides[3];  /**< in elements */
} tqai_positions;

/* ---- What calls work with -------------------------------------------------------------------- */

/** Working memory that calls leave to the next ones (tqai::Workspace); for one call at a time. */
typedef struct tqai_workspace tqai_workspace;

/** A piece of work for an executor: to be called with its `state` and each of 0 ... count - 1 once,
 * by any threads, at the same time or one after another. */
typedef void (*tqai_work)(void* state, int64_t index);
/** An application's own threads. Returns when no work runs any more and none is still to come; what
 * it leaves undone is done by the calling thread. user: of tqai_resources. */
typedef void (*tqai_executor)(void* user, int64_t count, tqai_work work, void* state);

/** What a call works with (tqai::Resources). Results do not depend on any of it. */
typedef struct tqai_resources {
  size_t size;                /**< written by the _init */
  int32_t threads;            /**< 0: as many as OpenMP gives; at most 1024 */
  tqai_executor parallel_for; /**< NULL: OpenMP's threads; else `threads` is needed */
  void* user;                 /**< NULL: handed to parallel_for */
  tqai_workspace* workspace;  /**< NULL: memory of the call's own */
} tqai_resources;

/** size: sizeof(*resources). Writes it and the defaults. */
TQAI_C_API void tqai_resources_init(tqai_resources* resources, size_t size);
/** An empty one. */
TQAI_C_API tqai_status tqai_workspace_create(tqai_workspace** workspace);
/** Ends a handle; NULL is let be. */
TQAI_C_API void tqai_workspace_destroy(tqai_workspace* workspace);
/** Bytes that it holds; 0 of NULL. */
TQAI_C_API size_t tqai_workspace_bytes(const tqai_workspace* workspace);

/* ---- Caches --------------------------------------------------------------------------------- */

/** Keys and values of one attention layer for a batch of rows (tqai::KvCache). */
typedef struct tqai_cache tqai_cache;

/** A basis for the keys of one attention layer (tqai::KeyBasis); below. */
typedef struct tqai_key_basis tqai_key_basis;

/** What a cache is made of; the comments say the defaults. */
typedef struct tqai_cache_options {
  size_t size;             /**< written by the _init */
  int32_t batch;           /**< 1 */
  int32_t kv_heads;        /**< to be set */
  int32_t head_dim;        /**< to be set: 8 to 576 */
  int32_t value_head_dim;  /**< 0: as head_dim */
  int32_t dtype;           /**< TQAI_F32: of keys and values */
  int32_t bits_k;          /**< 4: 1 to 8 a coordinate */
  int32_t bits_v;          /**< 2 */
  int32_t sink_tokens;     /**< 4: first tokens, exact for ever */
  int32_t residual_window; /**< 128: last tokens, exact */
  int32_t rotation;        /**< TQAI_ROTATION_AUTO */
  int32_t centering;       /**< TQAI_CENTERING_AUTO */
  int32_t rotary_dim;      /**< 0: no rotary embedding is known */
  int32_t rope_layout;     /**< TQAI_ROPE_HALF_SPLIT */
  const float* inv_freq;   /**< [rotary_dim / 2], radians a token; NULL without one */
  const uint8_t* sections; /**< [rotary_dim / 2], or NULL: all pairs are of section 0 */
  uint64_t seed;           /**< of the rotations */
  const char* level;       /**< NULL: tqai_default_level */
  /** NULL: none. The cache shares it: the handle may be destroyed at once. */
  const tqai_key_basis* key_basis;
  int32_t value_codes; /**< TQAI_CODES_SCALAR; a trellis's have 1 to 4 bits */
  int32_t key_codes;   /**< TQAI_CODES_SCALAR; a trellis's have 2 to 4 bits, and a key_basis */
} tqai_cache_options;

/** What of the tokens a query sees, and how scores become weights. */
typedef struct tqai_attend_options {
  size_t size;              /**< written by the _init */
  int32_t has_scale;        /**< 0: scale is 1/sqrt(head_dim) */
  float scale;              /**< multiplies q k, where has_scale is 1 */
  float soft_cap;           /**< 0: none */
  int32_t causal;           /**< 1: none of the queries sees tokens after its own */
  int64_t window;           /**< 0: none */
  int64_t first_token;      /**< 0: tokens before it are not seen */
  const tqai_tensor* mask;  /**< NULL: none. [batch or 1, query_heads or 1, queries, tokens -
                             * first_token]; TQAI_BOOL: nonzero = seen; else added to the scores */
  const float* sink_scores; /**< NULL: none. [query_heads] */
  /** NULL: none. [batch, queries, query_heads, 1] fp32, written: log of the sum of exp(score) over
   * what each query saw, by which outputs over different tokens merge (cache.hpp). */
  const tqai_output* log_sum_exp;
  const tqai_resources* resources; /**< NULL: the defaults */
} tqai_attend_options;

/** What a cache is, with the defaults filled in. */
typedef struct tqai_cache_info {
  size_t size;             /**< written by the _init */
  int32_t batch;           /**< rows */
  int32_t kv_heads;        /**< key/value heads */
  int32_t head_dim;        /**< of keys and queries */
  int32_t value_head_dim;  /**< of values */
  int32_t dtype;           /**< TQAI_F32, TQAI_F16 or TQAI_BF16 */
  int32_t bits_k;          /**< a coordinate of keys */
  int32_t bits_v;          /**< a coordinate of values */
  int32_t sink_tokens;     /**< first tokens, exact */
  int32_t residual_window; /**< last tokens, exact */
  int64_t tokens;          /**< of each row, padding and discarded ones included */
  int64_t first_token;     /**< that some row still holds */
  const char* level;       /**< for ever */
  int32_t value_codes;     /**< TQAI_CODES_SCALAR or TQAI_CODES_TRELLIS */
  int32_t key_codes;       /**< of keys */
} tqai_cache_info;

/** Bytes that a cache holds (tqai::MemoryReport). */
typedef struct tqai_memory {
  size_t size;               /**< written by the _init */
  int64_t tokens;            /**< held by all rows */
  int64_t packed_tokens;     /**< of those, in tiles */
  size_t packed_bytes;       /**< of tiles */
  size_t exact_bytes;        /**< of exact tokens */
  size_t overhead_bytes;     /**< of headers, lists, centres */
  size_t total_bytes;        /**< of these three */
  size_t mapped_bytes;       /**< tiles in pages of files; not in the total */
  size_t uncompressed_bytes; /**< of the same tokens in the dtype */
  size_t basis_bytes;        /**< of the shared key basis; not in the total */
} tqai_memory;

/** Tokens first ... first + count - 1. */
typedef struct tqai_token_span {
  int64_t first; /**< number of the first token */
  int64_t count; /**< how many */
} tqai_token_span;

/** size: sizeof(*options). Writes it and the defaults. */
TQAI_C_API void tqai_cache_options_init(tqai_cache_options* options, size_t size);
/** size: sizeof(*options). Writes it and the defaults. */
TQAI_C_API void tqai_attend_options_init(tqai_attend_options* options, size_t size);
/** size: sizeof(*info). Writes it, and 0 to all else. */
TQAI_C_API void tqai_cache_info_init(tqai_cache_info* info, size_t size);
/** size: sizeof(*memory). Writes it, and 0 to all else. */
TQAI_C_API void tqai_memory_init(tqai_memory* memory, size_t size);

/** An empty cache. */
TQAI_C_API tqai_status tqai_cache_create(const tqai_cache_options* options, tqai_cache** cache);
/** Ends a handle; NULL is let be. */
TQAI_C_API void tqai_cache_destroy(tqai_cache* cache);
/** Shares the tiles. */
TQAI_C_API tqai_status tqai_cache_copy(const tqai_cache* cache, tqai_cache** copy);

/** keys: [batch, kv_heads, n, head_dim], values: [batch, kv_heads, n, value_head_dim], of the
 * cache's dtype. positions: NULL where each token is one further than the one before. */
TQAI_C_API tqai_status tqai_cache_append(tqai_cache* cache, const tqai_tensor* keys,
                                         const tqai_tensor* values,
                                         const tqai_positions* positions);
/** As tqai_cache_append; resources: NULL for the defaults. */
TQAI_C_API tqai_status tqai_cache_append_with(tqai_cache* cache, const tqai_tensor* keys,
                                              const tqai_tensor* values,
                                              const tqai_positions* positions,
                                              const tqai_resources* resources);
/** *held, unless held is NULL: tokens of a row, at most, that are too long to be compressed. */
TQAI_C_API tqai_status tqai_cache_seal(tqai_cache* cache, int64_t* held);
/** As tqai_cache_seal; resources: NULL for the defaults. */
TQAI_C_API tqai_status tqai_cache_seal_with(tqai_cache* cache, int64_t* held,
                                            const tqai_resources* resources);
/** queries: [batch, query_heads, n, head_dim], those of the last n tokens; output: [batch, n,
 * query_heads, value_head_dim]. options: NULL for the defaults. */
TQAI_C_API tqai_status tqai_cache_attend(const tqai_cache* cache, const tqai_tensor* queries,
                                         const tqai_output* output,
                                         const tqai_attend_options* options);
/** Decompresses tokens from `first` on, as many as the tensors hold. */
TQAI_C_API tqai_status tqai_cache_gather(const tqai_cache* cache, int64_t first,
                                         const tqai_output* keys, const tqai_output* values);
/** Forgets all tokens from `tokens` on. */
TQAI_C_API tqai_status tqai_cache_crop(tqai_cache* cache, int64_t tokens);
/** Row i becomes a copy of row rows[i]; the batch becomes `count`. */
TQAI_C_API tqai_status tqai_cache_select(tqai_cache* cache, const int64_t* rows, size_t count);
/** counts: [batch], the first tokens of each row that are padding. */
TQAI_C_API tqai_status tqai_cache_set_padding(tqai_cache* cache, const int64_t* counts,
                                              size_t count);
/** Takes tokens of the last count / batch out of the rows that no query will ever see. hidden:
 * [batch, count / batch], not 0 for these. */
TQAI_C_API tqai_status tqai_cache_leave_out(tqai_cache* cache, const uint8_t* hidden, size_t count);
/** What tqai_cache_leave_out has taken out of a row: *count spans, of which the first `capacity` at
 * most are written to `spans`, which may be NULL where that is 0. */
TQAI_C_API tqai_status tqai_cache_left_out(const tqai_cache* cache, int32_t row,
                                           tqai_token_span* spans, size_t capacity, size_t* count);
/** Says that tokens before `token` will never be seen again. */
TQAI_C_API tqai_status tqai_cache_discard_before(tqai_cache* cache, int64_t token);
/** Tokens of a row that are held as codes. */
TQAI_C_API tqai_status tqai_cache_packed_tokens(const tqai_cache* cache, int32_t row,
                                                int64_t* tokens);
/** Fills `info`, after its _init. */
TQAI_C_API tqai_status tqai_cache_get_info(const tqai_cache* cache, tqai_cache_info* info);
/** Fills `memory`, after its _init. */
TQAI_C_API tqai_status tqai_cache_get_memory(const tqai_cache* cache, tqai_memory* memory);
/** Sets memory aside for the tiles of `tokens` tokens a row in all (KvCache::reserve). */
TQAI_C_API tqai_status tqai_cache_reserve(tqai_cache* cache, int64_t tokens);

/** 64 sealed tokens of a row as they lie in memory (tqai::SealedBlock). What it points to stays as
 * it is for as long as a cache holds the tokens: this one until it is cropped below them, discards
 * them or is destroyed, and each copy of it likewise. */
typedef struct tqai_block {
  size_t size;              /**< written by the _init */
  int64_t first_token;      /**< number of the first one */
  int32_t tokens;           /**< of the 64, the first ones: those that the row still has */
  int32_t centre_set;       /**< of the row's: tqai_cache_centre */
  int64_t first_position;   /**< of the first token, where `positions` is NULL */
  const int32_t* positions; /**< [sections, 64], or NULL where tokens stand one after another */
  int32_t sections;         /**< of `positions` */
  const void* tiles;        /**< [kv_heads, tile_bytes], 64-byte aligned; docs/format.md */
  size_t tile_bytes;        /**< of a head; its keys' codes come first */
  size_t value_codes;       /**< offset in a tile */
  size_t key_norms;         /**< offset; [64] FP16 */
  size_t value_norms;       /**< offset; [64] FP16 */
} tqai_block;

/** What is added to keys that codes stand for (tqai::CentreView). Lives as a tqai_block's bytes. */
typedef struct tqai_centre {
  size_t size;            /**< written by the _init */
  int32_t kind;           /**< TQAI_CENTERING_NONE, _MEAN or _ROPE */
  int32_t pairs;          /**< of the embedding; 0 without one */
  const float* constant;  /**< [head_dim] */
  const float* real;      /**< [pairs], or NULL */
  const float* imaginary; /**< [pairs], or NULL */
} tqai_centre;

/** size: sizeof(*block). Writes it, and 0 to all else. */
TQAI_C_API void tqai_block_init(tqai_block* block, size_t size);
/** size: sizeof(*centre). Writes it, and 0 to all else. */
TQAI_C_API void tqai_centre_init(tqai_centre* centre, size_t size);
/** Blocks that a row has sealed: *count, of which the first `capacity` at most are written to
 * `blocks`, each after its _init; NULL where that is 0. */
TQAI_C_API tqai_status tqai_cache_sealed_blocks(const tqai_cache* cache, int32_t row,
                                                tqai_block* blocks, size_t capacity, size_t* count);
/** Fills `centre`, after its _init. */
TQAI_C_API tqai_status tqai_cache_centre(const tqai_cache* cache, int32_t row, int32_t set,
                                         int32_t head, tqai_centre* centre);
/** Bytes that all caches of the process hold. */
TQAI_C_API size_t tqai_allocated_bytes(void);
/** From now on calls that would make it more than `bytes` return TQAI_NO_MEMORY, with the numbers
 * in tqai_last_error() and nothing changed; 0: no limit. */
TQAI_C_API void tqai_limit_memory(size_t bytes);

/* ---- Many caches at a time --------------------------------------------------------------------
 *
 * What the functions above do for one cache, for `count` of them in one parallel region, with the
 * same results (sequences.hpp): a runtime's sequences, of any lengths. All or nothing: on failure
 * every cache is as before. One that is changed comes once in a list. */

/** tqai_cache_append for each; keys, values: [count]; positions: [count] or NULL; resources: NULL
 * for the defaults, here and below. */
TQAI_C_API tqai_status tqai_caches_append(tqai_cache* const* caches, size_t count,
                                          const tqai_tensor* keys, const tqai_tensor* values,
                                          const tqai_positions* positions,
                                          const tqai_resources* resources);
/** The tokens of all caches one after another, tokens[i] of cache i: keys: [1, kv_heads, sum of
 * tokens, head_dim], values likewise, positions: [1, sections, sum] or NULL. Caches of one row and
 * one geometry. */
TQAI_C_API tqai_status tqai_caches_append_packed(tqai_cache* const* caches, size_t count,
                                                 const int64_t* tokens, const tqai_tensor* keys,
                                                 const tqai_tensor* values,
                                                 const tqai_positions* positions,
                                                 const tqai_resources* resources);
/** tqai_cache_seal for each; *held, unless held is NULL: the most that one of them says. */
TQAI_C_API tqai_status tqai_caches_seal(tqai_cache* const* caches, size_t count, int64_t* held,
                                        const tqai_resources* resources);
/** tqai_cache_attend for each; a cache may come several times. queries, outputs: [count]; options:
 * [count] pointers, any of them NULL for the defaults, or NULL for all; their `resources` are
 * NULL. */
TQAI_C_API tqai_status tqai_caches_attend(const tqai_cache* const* caches, size_t count,
                                          const tqai_tensor* queries, const tqai_output* outputs,
                                          const tqai_attend_options* const* options,
                                          const tqai_resources* resources);
/** The queries of all caches one after another, as in tqai_caches_append_packed: [1, query_heads,
 * sum of tokens, head_dim]; output: [1, sum, query_heads, value_head_dim]; options: of all, without
 * a mask, or NULL. */
TQAI_C_API tqai_status tqai_caches_attend_packed(const tqai_cache* const* caches, size_t count,
                                                 const int64_t* tokens, const tqai_tensor* queries,
                                                 const tqai_output* output,
                                                 const tqai_attend_options* options);
/** tqai_cache_crop for each; tokens: [count], what each keeps. */
TQAI_C_API tqai_status tqai_caches_crop(tqai_cache* const* caches, size_t count,
                                        const int64_t* tokens);

/** Bytes that tqai_cache_serialize writes. */
TQAI_C_API tqai_status tqai_cache_serialized_bytes(const tqai_cache* cache, size_t* bytes);
/** Writes that many bytes at `to`; TQAI_VALUE_ERROR where `capacity` is less. */
TQAI_C_API tqai_status tqai_cache_serialize(const tqai_cache* cache, void* to, size_t capacity);
/** As tqai_cache_serialized_bytes, for a cache whose keys are in a basis, with no more than its id
 * or with its matrices. basis: TQAI_BASIS_ID, as the plain functions, or TQAI_BASIS_MATRICES. */
TQAI_C_API tqai_status tqai_cache_serialized_bytes_as(const tqai_cache* cache, int32_t basis,
                                                      size_t* bytes);
/** As tqai_cache_serialize; `basis` as above. */
TQAI_C_API tqai_status tqai_cache_serialize_as(const tqai_cache* cache, int32_t basis, void* to,
                                               size_t capacity);
/** level: NULL for tqai_default_level. Bytes that have no more than the id of a basis need
 * tqai_cache_deserialize_with. */
TQAI_C_API tqai_status tqai_cache_deserialize(const void* bytes, size_t size, const char* level,
                                              tqai_cache** cache);
/** As tqai_cache_deserialize; of `bases` a cache whose keys are in one takes that of its id, and
 * only where there is none what its bytes have. */
TQAI_C_API tqai_status tqai_cache_deserialize_with(const void* bytes, size_t size,
                                                   const char* level,
                                                   const tqai_key_basis* const* bases, size_t count,
                                                   tqai_cache** cache);

/* ---- Bases for keys ------------------------------------------------------------------------- */

/** Second moments of a layer's keys and queries, which a basis is learnt from (tqai::KeyMoments).
 */
typedef struct tqai_key_moments tqai_key_moments;

/** Of nothing yet. options: those of the caches that will have the basis; kv_heads, head_dim and
 * the rotary embedding are taken from them. */
TQAI_C_API tqai_status tqai_key_moments_create(const tqai_cache_options* options,
                                               tqai_key_moments** moments);
/** Ends a handle; NULL is let be. */
TQAI_C_API void tqai_key_moments_destroy(tqai_key_moments* moments);
/** keys: [tokens, head_dim] of a kv head, as attention sees them. positions: what they have been
 * turned by, [sections, tokens] or [tokens], `count` in all; NULL and 0: token i stands at i. */
TQAI_C_API tqai_status tqai_key_moments_add_keys(tqai_key_moments* moments, int32_t head,
                                                 const float* keys, size_t tokens,
                                                 const int64_t* positions, size_t count);
/** Queries that read a kv head; otherwise as tqai_key_moments_add_keys. */
TQAI_C_API tqai_status tqai_key_moments_add_queries(tqai_key_moments* moments, int32_t head,
                                                    const float* queries, size_t tokens,
                                                    const int64_t* positions, size_t count);
/** What is known without having seen any: moments at position 0, each [head_dim, head_dim], of any
 * scale, that weigh as much as `tokens` tokens. */
TQAI_C_API tqai_status tqai_key_moments_add_prior(tqai_key_moments* moments, int32_t head,
                                                  const double* keys, const double* queries,
                                                  double tokens);

/** The basis for codes of `bits` bits, good up to `last_position` of a text: 32768 where nothing
 * else is known. Takes 5 ms a head of 64, 0.3 s a head of 256. */
TQAI_C_API tqai_status tqai_key_basis_learn(const tqai_key_moments* moments, int32_t bits,
                                            int64_t last_position, tqai_key_basis** basis);
/** Ends a handle; NULL is let be. Caches that share the basis keep it. */
TQAI_C_API void tqai_key_basis_destroy(tqai_key_basis* basis);
/** Tells it from others, in any process. */
TQAI_C_API tqai_status tqai_key_basis_id(const tqai_key_basis* basis, uint64_t* id);
/** Bytes that tqai_key_basis_serialize writes. */
TQAI_C_API tqai_status tqai_key_basis_serialized_bytes(const tqai_key_basis* basis, size_t* bytes);
/** Writes that many bytes at `to`; TQAI_VALUE_ERROR where `capacity` is less. */
TQAI_C_API tqai_status tqai_key_basis_serialize(const tqai_key_basis* basis, void* to,
                                                size_t capacity);
/** What tqai_key_basis_serialize wrote. */
TQAI_C_API tqai_status tqai_key_basis_deserialize(const void* bytes, size_t size,
                                                  tqai_key_basis** basis);

/* ---- Files ---------------------------------------------------------------------------------- */

/** Paths are UTF-8. header: a JSON object of the application's, or NULL for an empty one. */
TQAI_C_API tqai_status tqai_save(const char* path, const tqai_cache* const* layers, size_t count,
                                 const char* header);
/** As tqai_save; basis: as tqai_cache_serialize_as. */
TQAI_C_API tqai_status tqai_save_as(const char* path, const tqai_cache* const* layers, size_t count,
                                    const char* header, int32_t basis);

/** A file that tqai_save or the Python package wrote, open for reading (tqai::CacheFile). */
typedef struct tqai_file tqai_file;

/** How caches come out of files. */
typedef struct tqai_load_options {
  size_t size;       /**< written by the _init */
  int32_t mapped;    /**< 0; 1: tiles stay in the file's pages, see files.hpp */
  int32_t verify;    /**< 1: checksums are compared */
  const char* level; /**< NULL: tqai_default_level */
  const tqai_key_basis* const* key_bases; /**< as tqai_cache_deserialize_with; NULL: none */
  size_t key_basis_count;                 /**< how many */
} tqai_load_options;

/** size: sizeof(*options). Writes it and the defaults. */
TQAI_C_API void tqai_load_options_init(tqai_load_options* options, size_t size);
/** Reads the header and checks it. */
TQAI_C_API tqai_status tqai_file_open(const char* path, tqai_file** file);
/** Ends a handle; NULL is let be. */
TQAI_C_API void tqai_file_destroy(tqai_file* file);
/** The application's JSON object. */
TQAI_C_API tqai_status tqai_file_header(const tqai_file* file, const char** header);
/** *holds: 1 where the file has a compressed layer of this number, else 0. */
TQAI_C_API tqai_status tqai_file_holds(const tqai_file* file, size_t layer, int32_t* holds);
/** options: NULL for the defaults. The file may be destroyed before the cache. */
TQAI_C_API tqai_status tqai_file_load(const tqai_file* file, size_t layer,
                                      const tqai_load_options* options, tqai_cache** cache);

/* ---- Codebooks and quantisers --------------------------------------------------------------- */

/** Lives as long as the process. */
typedef struct tqai_codebook tqai_codebook;

/** head_dim 8 to 576, bits 1 to 8; grid TQAI_GRID_EXACT or TQAI_GRID_INT8. Milliseconds the first
 * time. */
TQAI_C_API tqai_status tqai_codebook_get(int32_t head_dim, int32_t bits, int32_t grid,
                                         const tqai_codebook** codebook);
/** *centroids: [2^bits], ascending. */
TQAI_C_API tqai_status tqai_codebook_centroids(const tqai_codebook* codebook,
                                               const float** centroids, size_t* count);
/** *boundaries: [2^bits - 1]. */
TQAI_C_API tqai_status tqai_codebook_boundaries(const tqai_codebook* codebook,
                                                const float** boundaries, size_t* count);
/** Centroid i is step * levels[i]; no levels and a step of 0 for the exact grid. */
TQAI_C_API tqai_status tqai_codebook_levels(const tqai_codebook* codebook, const int8_t** levels,
                                            size_t* count, float* step);
/** Expected squared error of a unit vector. */
TQAI_C_API tqai_status tqai_codebook_distortion(const tqai_codebook* codebook, double* distortion);

/** Single vectors to codes and FP16 norms (tqai::Quantizer, tqai::ProdQuantizer). */
typedef struct tqai_quantizer tqai_quantizer;

/** What a quantiser is made of; the comments say the defaults. */
typedef struct tqai_quantizer_options {
  size_t size;              /**< written by the _init */
  int32_t head_dim;         /**< to be set: 8 to 576 */
  int32_t bits;             /**< 4 */
  int32_t rotation;         /**< TQAI_ROTATION_AUTO */
  int32_t grid;             /**< TQAI_GRID_EXACT */
  int32_t norm_correction;  /**< 1; not for unbiased ones */
  int32_t unbiased;         /**< 0: least error; 1: unbiased inner products */
  uint64_t seed;            /**< of the rotation */
  uint64_t projection_seed; /**< of unbiased ones */
  int32_t codes;            /**< TQAI_CODES_SCALAR; not for unbiased ones */
} tqai_quantizer_options;

/** size: sizeof(*options). Writes it and the defaults. */
TQAI_C_API void tqai_quantizer_options_init(tqai_quantizer_options* options, size_t size);
/** A quantiser of vectors of one dimension. */
TQAI_C_API tqai_status tqai_quantizer_create(const tqai_quantizer_options* options,
                                             tqai_quantizer** quantizer);
/** Ends a handle; NULL is let be. */
TQAI_C_API void tqai_quantizer_destroy(tqai_quantizer* quantizer);
/** Of one vector. */
TQAI_C_API tqai_status tqai_quantizer_sizes(const tqai_quantizer* quantizer, size_t* code_bytes,
                                            int32_t* norms);
/** vectors: [rows, head_dim]; codes: [rows, code_bytes]; norms: [rows, norms], FP16 bits. */
TQAI_C_API tqai_status tqai_quantizer_encode(const tqai_quantizer* quantizer, const float* vectors,
                                             int64_t rows, uint8_t* codes, uint16_t* norms);
/** The inverse, up to the quantisation error. */
TQAI_C_API tqai_status tqai_quantizer_decode(const tqai_quantizer* quantizer, const uint8_t* codes,
                                             const uint16_t* norms, int64_t rows, float* vectors);
/** queries: [query_rows, head_dim]; products: [query_rows, rows]. */
TQAI_C_API tqai_status tqai_quantizer_inner_products(const tqai_quantizer* quantizer,
                                                     const float* queries, int64_t query_rows,
                                                     const uint8_t* codes, const uint16_t* norms,
                                                     int64_t rows, float* products);

#ifdef __cplusplus
}
#endif

#endif
