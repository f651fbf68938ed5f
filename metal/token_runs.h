// Which tiles a threadgroup of pass 1 attends to, of which the rows of a lane see which part.

#include "arguments.h"
#include "tiles.h"

struct TokenRun {
  int first_tile, end_tile;
  int end;  // tokens behind the last that anybody sees
  int hidden;  // of the last ones, that no row sees but the last of each query head; then fewer
  // A window left behind tokens from `keep` on that are before `seen_from`, in numbers of the run.
  int keep, seen_from;
  // Columns of the mask: those of the first `keep` tokens are their numbers. Others have
  // `before` columns more before them than tokens of the run, and from gap_at on `gap` more.
  int before, gap_at, gap;
};

// Stored tokens that a window has left behind, from number `keep` on.
TQ_FUNC int forgotten_tokens(const thread AttendArguments& args) {
  int forgotten = args.sink + args.packed + args.recent - args.most_shown;
  return forgotten > 0 ? forgotten : 0;
}

// Of split number `split` of the packed tokens.
TQ_FUNC TokenRun packed_run(int split, const thread AttendArguments& args) {
  int tiles = args.tokens_per_split / TILE_TOKENS;
  int last = (args.packed + TILE_TOKENS - 1) / TILE_TOKENS;
  TokenRun run;
  run.first_tile = split * tiles;
  run.end_tile = run.first_tile + tiles < last ? run.first_tile + tiles : last;
  run.end = args.packed;
  run.hidden = 0;
  run.keep = 0;
  run.before = args.sink - forgotten_tokens(args);
  run.seen_from = args.keep - run.before;
  run.gap_at = 0;
  run.gap = 0;
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
  run.keep = args.keep;
  run.before = -forgotten_tokens(args);
  int number = args.keep - run.before;  // of the first that is seen behind them
  int recent = number - args.packed;
  run.seen_from = number <= args.sink ? number : recent > args.sink ? recent : args.sink;
  run.gap_at = args.sink;
  run.gap = args.packed;
  return run;
}

// Behind what token number a row sees nothing more of the run.
TQ_FUNC int row_end(const thread TokenRun& run, int row, const thread AttendArguments& args) {
  if (run.hidden == 0) return run.end;
  int hidden = run.hidden - row % args.steps;
  return run.end - (hidden < args.recent ? hidden : args.recent);
}

// The mask's column of a token that is seen.
TQ_FUNC int column_of(const thread TokenRun& run, int token) {
  if (token < run.keep) return token;
  return token + run.before + (token < run.gap_at ? 0 : run.gap);
}

// Columns of the mask are the longest row's tokens but forgotten ones. Each row's are the last of
// them, from this one on.
TQ_FUNC int first_column(const thread AttendArguments& args) {
  return tq_min(args.longest, args.most_shown)
         - (args.sink + args.packed + args.recent - forgotten_tokens(args));
}
