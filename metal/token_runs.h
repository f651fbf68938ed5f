// Which tiles a threadgroup of pass 1 attends to, of which the rows of a lane see which part.

#include "arguments.h"
#include "tiles.h"

struct TokenRun {
  int first_tile, end_tile;
  int end;  // tokens behind the last that anybody sees
  int hidden;  // of the last ones, that no row sees but the last of each query head; then fewer
  // Its mask begins with the column of token 0 and has `mask_gap` others before mask_gap_at.
  int mask_gap_at, mask_gap;
};

// Of split number `split` of the packed tokens.
TQ_FUNC TokenRun packed_run(int split, const thread AttendArguments& args) {
  int tiles = args.tokens_per_split / TILE_TOKENS;
  int last = (args.packed + TILE_TOKENS - 1) / TILE_TOKENS;
  TokenRun run;
  run.first_tile = split * tiles;
  run.end_tile = run.first_tile + tiles < last ? run.first_tile + tiles : last;
  run.end = args.packed;
  run.hidden = 0;
  run.mask_gap_at = 0;
  run.mask_gap = args.sink;
  return run;
}

// Of split number `split` of the tokens that are not packed, `tiles` to each.
TQ_FUNC TokenRun plain_run(int split, int tiles, const thread AttendArguments& args) {
  TokenRun run;
  run.end = args.sink + args.recent;
  int last = (run.end + TILE_TOKENS - 1) / TILE_TOKENS;
  run.first_tile = split * tiles;
  run.end_tile = run.first_tile + tiles < last ? run.first_tile + tiles : last;
  run.hidden = args.causal ? args.steps - 1 : 0;
  run.mask_gap_at = args.sink;
  run.mask_gap = args.packed;
  return run;
}

// Behind what token number a row sees nothing more of the run.
TQ_FUNC int row_end(const thread TokenRun& run, int row, const thread AttendArguments& args) {
  if (run.hidden == 0) return run.end;
  int hidden = run.hidden - row % args.steps;
  return run.end - (hidden < args.recent ? hidden : args.recent);
}
