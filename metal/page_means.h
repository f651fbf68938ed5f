// Logits of the means of pages, which a page's tokens have on top of their own. They come out
// of the same products, once a split: 16 pages to a simdgroup, so a split may have tokens of
// as many pages as its simdgroups together (backends/geometry.py).

#include "arguments.h"
#include "format_plain.h"
#include "query_rows.h"
#include "token_runs.h"

constant constexpr int MEANS_OF_SIMDGROUP = 16;

// Threadgroup floats for them: rows of each page together.
constexpr int tq_means_floats(int simdgroups, int rows) {
  return simdgroups * MEANS_OF_SIMDGROUP * rows;
}

// A simdgroup's means, page by page as tokens of a tile; each lane knows the place of one, that
// of the page's first tile in pages. Behind the split's last page it is the last.
struct PageRows {
  const device half* means;
  int place;
};
// means: half (pages, DIM) of one KV head, tiles: the places of the text's tiles.
TQ_FUNC PageRows find_means(
    const device half* means, const device int* tiles, const thread TokenRun& run,
    const thread AttendArguments& args, uint simdgroup, uint lane) {
  int page_tiles = args.page / TILE_TOKENS;
  int page = run.first_tile / page_tiles + MEANS_OF_SIMDGROUP * int(simdgroup) + int(lane);
  page = tq_min(page, (run.end_tile - 1) / page_tiles);
  PageRows pages;
  pages.means = means;
  pages.place = tiles[page * page_tiles] / page_tiles;
  return pages;
}
template <int DIM>
TQ_FUNC const device half* vector_of(const thread PageRows& pages, int page) {
  return pages.means + nth_place(pages.place, uint(page)) * DIM;
}

// Those of the first units at least: they do not wait for queries.
constexpr int tq_means_ahead(int padded) { return tq_units(padded) <= 4 ? tq_units(padded) : 1; }
template <int DIM, int PADDED>
struct Means {
  typedef PlainFormat<half, false, DIM, PADDED> Format;
  PageRows pages;
  typename Format::Unit units[tq_means_ahead(PADDED)];
};
template <int DIM, int PADDED>
TQ_FUNC void load_means(
    const thread PageRows& pages, uint lane, thread Means<DIM, PADDED>& ahead) {
  typedef typename Means<DIM, PADDED>::Format Format;
  ahead.pages = pages;
  TQ_UNROLL
  for (int u = 0; u < tq_means_ahead(PADDED); u++) {
    ahead.units[u] = Format::load(ahead.pages, 0, u, unit_columns<PADDED>(u), lane);
  }
}

// Where a simdgroup's tile is among the split's pages. Divisions are slow: it counts.
struct PageCursor {
  int page;   // since the first
  int tiles;  // of it before the one at hand
};

// Fill `logits_of_means`, and find this simdgroup's first tile among them. Every simdgroup must
// call it. `factor` undoes the queries'.
template <int DIM, int PADDED, typename Rows>
TQ_FUNC PageCursor make_logits_of_means(
    const threadgroup half2* queries, const thread Means<DIM, PADDED>& means, float factor,
    const thread TokenRun& run, const thread AttendArguments& args,
    threadgroup float* logits_of_means, uint simdgroup, uint lane) {
  typedef typename Means<DIM, PADDED>::Format Format;
  constexpr int UNITS = tq_units(PADDED);
  typename Format::Params params;
  float logits[Rows::LOGITS];
  TQ_UNROLL
  for (int i = 0; i < Rows::LOGITS; i++) logits[i] = 0.0f;
  if (tq_means_ahead(PADDED) == UNITS) {
    TQ_UNROLL
    for (int u = 0; u < UNITS; u++) {
      half2 query[Rows::LANE_QUERIES];
      Rows::template load_unit_query<PADDED>(queries, u, lane, query);
      Rows::template add_unit_logits<Format, 2>(
          params, means.units[tq_means_ahead(PADDED) == UNITS ? u : 0], unit_columns<PADDED>(u),
          query, logits);
    }
  } else {
    typename Format::Unit next = means.units[0];
    TQ_ROLL
    for (int u = 0; u < UNITS; u++) {
      typename Format::Unit unit = next;
      int next_unit = tq_min(u + 1, UNITS - 1);
      next = Format::load(means.pages, 0, next_unit, unit_columns<PADDED>(next_unit), lane);
      half2 query[Rows::LANE_QUERIES];
      Rows::template load_unit_query<PADDED>(queries, u, lane, query);
      Rows::template add_unit_logits<Format, 2>(
          params, unit, unit_columns<PADDED>(u), query, logits);
    }
  }
  Rows::share_logits(logits, lane);
  // Pages are a tile's first tokens.
  TQ_UNROLL
  for (int i = 0; i < Rows::LANE_TOKENS; i++) {
    int page = Rows::token(lane, i);
    if (page >= MEANS_OF_SIMDGROUP) continue;
    page += MEANS_OF_SIMDGROUP * int(simdgroup);
    TQ_UNROLL
    for (int e = 0; e < Rows::LANE_ROWS; e++) {
      logits_of_means[page * Rows::ROWS + Rows::row(lane, e)] =
          logits[Rows::logit_at(e, i)] * factor;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  PageCursor cursor;
  int page_tiles = args.page / TILE_TOKENS;
  cursor.tiles = run.first_tile % page_tiles + int(simdgroup);
  cursor.page = cursor.tiles / page_tiles;
  cursor.tiles -= cursor.page * page_tiles;
  return cursor;
}

// On to this simdgroup's tile of the next round.
template <int SIMDGROUPS>
TQ_FUNC void next_round(thread PageCursor& cursor, const thread AttendArguments& args) {
  cursor.tiles += SIMDGROUPS;
  while (cursor.tiles >= args.page / TILE_TOKENS) {
    cursor.tiles -= args.page / TILE_TOKENS;
    cursor.page++;
  }
}
