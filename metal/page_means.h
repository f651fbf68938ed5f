// Logits of the means of pages, which a page's tokens have on top of their own: those of
// MEANS_AT_ONCE pages come out of the products that logits of tokens do.

#include "arguments.h"
#include "format_plain.h"
#include "tiles.h"

constant constexpr int MEANS_AT_ONCE = 16;

// Where a run of tokens is among pages. Divisions are slow: it counts down.
struct PageCursor {
  int page;        // the next one
  int tiles;       // until it begins, at least 1
  int next_tiles;  // between its begin and that of the one behind it
  // A lane's two rows' logits of pages `major` and 8 + major from a multiple of
  // MEANS_AT_ONCE on.
  float logits[4];
};

TQ_FUNC PageCursor make_page_cursor(int first_token, const thread AttendArguments& args) {
  PageCursor cursor;
  cursor.page = first_token / args.page;
  cursor.tiles = 1;
  cursor.next_tiles = (args.page - first_token % args.page) / TILE_TOKENS;
  return cursor;
}

// On to the next tile; mean_logit: of a lane's two rows, changes when a page begins. means:
// half (pages, DIM). `inverse_factor` undoes the queries'.
template <int DIM>
TQ_FUNC void next_tile(
    thread PageCursor& cursor, const thread half2* query, const device half* means,
    float inverse_factor, const thread AttendArguments& args, uint lane,
    thread float* mean_logit, bool is_first) {
  if (--cursor.tiles > 0) return;
  constexpr int LANE_GROUPS = tq_key_groups(DIM);
  typedef PlainFormat<half, DIM> Means;
  int index = cursor.page % MEANS_AT_ONCE;
  if (is_first || index == 0) {
    PlainTokens<half> pages;
    pages.sink = pages.recent = means;
    pages.recent_stride = DIM;
    pages.sink_count = 0;
    pages.count = (args.packed + args.page - 1) / args.page;
    typename Means::DecodeParams params;
    typename Means::Cursor cursors[LANE_GROUPS];
    TQ_UNROLL
    for (int i = 0; i < LANE_GROUPS; i++) {
      uint group = tq_min(tq_minor(lane) * LANE_GROUPS + i, uint((DIM + 15) / 16 - 1));
      cursors[i] = Means::make_cursor(pages, group, (DIM + 15) / 16);
      Means::advance(cursors[i], cursor.page - index + int(tq_major(lane)));
    }
    tile_logits<Means, DIM, MEANS_AT_ONCE>(query, params, cursors, cursor.logits);
  }
  ushort source = ushort(tq_lane(uint(index % 8), tq_minor(lane)));
  TQ_UNROLL
  for (int e = 0; e < 2; e++) {
    float logit = index < 8 ? cursor.logits[e] : cursor.logits[2 + e];
    mean_logit[e] = simd_shuffle(logit, source) * inverse_factor;
  }
  cursor.page++;
  cursor.tiles = cursor.next_tiles;
  cursor.next_tiles = args.page / TILE_TOKENS;
}
