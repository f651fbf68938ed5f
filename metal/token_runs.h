// Which tokens a simdgroup of pass 1 attends to, of which the rows of a lane see which part.

#include "compat/fragments.h"
#include "arguments.h"
#include "tiles.h"

// A simdgroup's share of a split.
struct TokenRun {
  int first, end;
  int row_ends[2];  // what this lane's rows see of it ends here
  // Its mask begins with the column of token 0 and has `mask_gap` others before mask_gap_at.
  int mask_gap_at, mask_gap;
};

// Of split number `split` of the packed tokens; past the last token it is empty.
TQ_FUNC TokenRun packed_run(
    int split, int simdgroup, int simdgroups, const thread AttendArguments& args) {
  int count = args.tokens_per_split / simdgroups;
  TokenRun run;
  run.first = split * args.tokens_per_split + simdgroup * count;
  run.end = run.first + count < args.packed ? run.first + count : args.packed;
  run.row_ends[0] = run.row_ends[1] = run.end;
  run.mask_gap_at = 0;
  run.mask_gap = args.sink;
  return run;
}

// Tile number `tile` of the tokens that are not packed; past the last token it is empty.
TQ_FUNC TokenRun plain_run(
    int tile, int first_row, const thread AttendArguments& args, uint lane) {
  int count = args.sink + args.recent;
  TokenRun run;
  run.first = tile * TILE_TOKENS;
  run.end = run.first + TILE_TOKENS < count ? run.first + TILE_TOKENS : count;
  TQ_UNROLL
  for (int e = 0; e < 2; e++) {
    int step = (first_row + int(2 * tq_minor(lane)) + e) % args.steps;
    int hidden = args.causal ? args.steps - 1 - step : 0;
    if (hidden > args.recent) hidden = args.recent;
    run.row_ends[e] = run.end < count - hidden ? run.end : count - hidden;
  }
  run.mask_gap_at = args.sink;
  run.mask_gap = args.packed;
  return run;
}
