// Format POLYNOMIAL: codes of coordinates, laid out as packing.h draws, whose levels are a
// polynomial of the code (unpack.h).

#include "format.h"
#include "unpack.h"

template <int DIM, int BITS, int TERMS, bool SINGLE_TABLE>
struct Format<POLYNOMIAL, DIM, BITS, TERMS, SINGLE_TABLE> {
  enum { WORDS = tq_words(DIM, BITS), SCALES = 1, LOAD_WORDS = BITS / 2 + 1 };
  typedef GroupCursor<BITS> Cursor;
  typedef GroupCodes<BITS> Codes;
  typedef LevelPolynomial<TERMS> DecodeParams;

  static TQ_FUNC DecodeParams make_params(
      const device float* params, const threadgroup half2*, uint) {
    return make_polynomial<TERMS>(params);
  }
  static TQ_FUNC Cursor make_cursor(
      const thread PackedTokens& tokens, uint group, uint groups) {
    return make_group_cursor<BITS>(tokens.words, group, groups);
  }
  static TQ_FUNC void advance(thread Cursor& cursor, int tokens) {
    cursor.own += tokens * int(WORDS);
    cursor.shared_word += tokens * int(WORDS);
  }
  static TQ_FUNC Codes load(const thread Cursor& cursor, int tokens) {
    return load_group<BITS>(cursor, tokens * int(WORDS));
  }
  static TQ_FUNC half2 decode_pair(
      const thread DecodeParams& params, const thread Codes& codes, int p) {
    return pair_levels<BITS, TERMS>(params, codes, p);
  }
  struct TokenPair {
    Codes even, odd;
  };
  static TQ_FUNC TokenPair make_token_pair(const thread Codes& a, const thread Codes& b) {
    TokenPair tokens;
    split_even_odd<BITS>(a, b, tokens.even, tokens.odd);
    return tokens;
  }
  static TQ_FUNC void decode_even_odd(
      const thread DecodeParams& params, const thread TokenPair& tokens, int p,
      thread half2& even, thread half2& odd) {
    even = pair_levels<BITS, TERMS>(params, tokens.even, p);
    odd = pair_levels<BITS, TERMS>(params, tokens.odd, p);
  }
};
