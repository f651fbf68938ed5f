// A tile of 32 tokens: their logits, and their weighted values. Every code is decoded once
// for all query rows, straight into the fragments of matrix products. A lane, of `major`
// index 0..7 and `minor` index 0..3 (compat/*/fragments.h), decodes of the tile
//
//     keys     token `major` of each 8,                LANE_GROUPS groups from
//                                                      minor * LANE_GROUPS on
//     values   tokens 2 * minor, 2 * minor + 1 of each 8,   groups major + 8 * i
//
// Codes of 16 tokens go into a product together: tokens 0-7 and tokens 8-15.

#include "compat/fragments.h"
#include "format.h"

constant constexpr int TILE_TOKENS = 32;

// Groups that a lane decodes of every key and of every value that is its own.
constexpr int tq_key_groups(int dim) { return ((dim + 15) / 16 + 3) / 4; }
constexpr int tq_value_groups(int dim) { return ((dim + 15) / 16 + 7) / 8; }

// Whether codes that take this many words of a lane are loaded before they are needed.
// Registers are too few for more.
constexpr bool tq_loads_ahead(int words) { return words <= 48; }

// Logits of TOKENS tokens, not yet scaled: of rows 2 * minor and 2 * minor + 1 for token
// `major` of each 8. query: as load_query_fragments leaves it.
template <typename F, int DIM, int TOKENS>
TQ_FUNC void tile_logits(
    const thread half2* query, const thread typename F::DecodeParams& params,
    const thread typename F::Cursor* cursors, thread float* logits) {
  constexpr int LANE_GROUPS = tq_key_groups(DIM);
  // Blocks of 16 tokens loaded before any is decoded: their loads are in flight together.
  constexpr int BLOCKS = TOKENS >= 32 && LANE_GROUPS * F::LOAD_WORDS <= 8 ? 2 : 1;
  constexpr bool AHEAD = tq_loads_ahead(2 * BLOCKS * LANE_GROUPS * F::LOAD_WORDS);
  TQ_UNROLL
  for (int first = 0; first < TOKENS / 16; first += BLOCKS) {
    typename F::Codes codes[2 * BLOCKS * LANE_GROUPS];
    TQ_UNROLL
    for (int j = 0; AHEAD && j < 2 * BLOCKS; j++) {
      TQ_UNROLL
      for (int i = 0; i < LANE_GROUPS; i++) {
        codes[j * LANE_GROUPS + i] = F::load(cursors[i], 16 * first + 8 * j);
      }
    }
    TQ_UNROLL
    for (int b = 0; b < BLOCKS; b++) {
      thread float* block_logits = logits + 4 * (first + b);
      TQ_UNROLL
      for (int i = 0; i < 4; i++) block_logits[i] = 0.0f;
      TQ_UNROLL
      for (int i = 0; i < LANE_GROUPS; i++) {
        typename F::Codes tokens_0_7;
        typename F::Codes tokens_8_15;
        if (AHEAD) {
          tokens_0_7 = codes[2 * b * LANE_GROUPS + i];
          tokens_8_15 = codes[(2 * b + 1) * LANE_GROUPS + i];
        } else {
          tokens_0_7 = F::load(cursors[i], 16 * (first + b));
          tokens_8_15 = F::load(cursors[i], 16 * (first + b) + 8);
        }
        TQ_UNROLL
        for (int p = 0; p < 8; p += 2) {
          tq_logits_product(
              block_logits, query[i * 8 + p], query[i * 8 + p + 1],
              F::decode_pair(params, tokens_0_7, p), F::decode_pair(params, tokens_0_7, p + 1),
              F::decode_pair(params, tokens_8_15, p),
              F::decode_pair(params, tokens_8_15, p + 1));
        }
      }
    }
  }
}

// Codes of a tile's values that a lane loads ahead, before it needs them: all or none.
template <typename F, int DIM>
constexpr int tq_codes_ahead() {
  return tq_loads_ahead(tq_value_groups(DIM) * (TILE_TOKENS / 4) * int(F::LOAD_WORDS))
             ? tq_value_groups(DIM) * (TILE_TOKENS / 4)
             : 0;
}

// Those of 2 tokens of each 8, of each of this lane's groups.
template <typename F, int DIM>
TQ_FUNC void load_values(
    const thread typename F::Cursor* cursors, thread typename F::Codes* codes) {
  constexpr int AHEAD = tq_codes_ahead<F, DIM>();
  TQ_UNROLL
  for (int j = 0; j < AHEAD; j++) {
    int token = j % (TILE_TOKENS / 4);
    codes[j] = F::load(cursors[j / (TILE_TOKENS / 4)], 8 * (token / 2) + token % 2);
  }
}

// Add a tile's weighted values to `sums`: per group of this lane and pair 4 floats, the
// even element of rows 2 * minor and 2 * minor + 1, then the odd one. codes: as load_values
// leaves them.
template <typename F, int DIM>
TQ_FUNC void add_weighted_values(
    const thread half2* weights, const thread typename F::DecodeParams& params,
    const thread typename F::Cursor* cursors, const thread typename F::Codes* codes,
    thread float* sums) {
  constexpr bool AHEAD = tq_codes_ahead<F, DIM>() > 0;
  TQ_UNROLL
  for (int i = 0; i < tq_value_groups(DIM); i++) {
    TQ_UNROLL
    for (int b = 0; b < TILE_TOKENS / 16; b++) {
      typename F::Codes block[4];
      TQ_UNROLL
      for (int j = 0; j < 4; j++) {
        if (AHEAD) {
          block[j] = codes[i * (TILE_TOKENS / 4) + 4 * b + j];
        } else {
          block[j] = F::load(cursors[i], 16 * b + 8 * (j / 2) + j % 2);
        }
      }
      typename F::TokenPair tokens_0_7 = F::make_token_pair(block[0], block[1]);
      typename F::TokenPair tokens_8_15 = F::make_token_pair(block[2], block[3]);
      TQ_UNROLL
      for (int p = 0; p < 8; p++) {
        half2 even_0_7, odd_0_7, even_8_15, odd_8_15;
        F::decode_even_odd(params, tokens_0_7, p, even_0_7, odd_0_7);
        F::decode_even_odd(params, tokens_8_15, p, even_8_15, odd_8_15);
        tq_values_product(
            sums + (i * 8 + p) * 4, even_0_7, odd_0_7, even_8_15, odd_8_15, weights[2 * b],
            weights[2 * b + 1]);
      }
    }
  }
}
