// The driver that follows the declaration under test. Reads one case from stdin, writes float32 triples
// (transformed logit, its product with sm_scale_log2, mask) for every request, query, KV index and query head, KV
// indices PADDING past the end included, as FlashInfer's decode kernel asks for them.
struct Block { int q_tile, q_head, kv_head, qo_start, kv_start, qo_len, kv_len, request; };
constexpr uint32_t PADDING = 9;

template <typename Variant, typename P>
void evaluate(const P& params, Variant& variant, const Array<float>& logits, size_t& at, uint32_t b,
              uint32_t qo_len, uint32_t kv_len, uint32_t group, uint32_t kv_heads, uint32_t batch_idx) {
  for (uint32_t qo = 0; qo < qo_len + 1; ++qo)
    for (uint32_t kv = 0; kv < kv_len + PADDING; ++kv)
      for (uint32_t head = 0; head < group * kv_heads; ++head) {
        const float x = variant.LogitsTransform(params, logits[at++], batch_idx, qo, kv, head, head / group);
        const float out[3] = {x, x * variant.sm_scale_log2,
                              float(variant.LogitsMask(params, batch_idx, qo, kv, head, head / group))};
        fwrite(out, sizeof(float), 3, stdout);
      }
}

int main() {
  Array<int32_t> head;  // page_size, kv_heads, group, batch
  Array<double> scale;
  Array<int32_t> indptr, indices, last, qo_indptr;
  Array<float> votes;
  Array<uint8_t> mask;
  Array<int32_t> mask_indptr;
  Array<float> logits;
  const uint32_t kv_heads = head[1], group = head[2], batch = head[3];
  size_t at = 0;
  for (uint32_t b = 0; b < batch; ++b) {
    const uint32_t qo_len = qo_indptr[b + 1] - qo_indptr[b];
#ifdef FA3
    const uint32_t kv_len = indptr[b + 1] - indptr[b];
    for (uint32_t h = 0; h < kv_heads; ++h) {
      Mainloop params{indices.at, {votes.at, scale[0], int64_t(kv_heads)}};
      // q tile, query head, kv head, first query, first KV index, lengths, request: hopper/prefill_sm90.cuh's order
      const Block block{0, int(h * group), int(h), qo_indptr[b], indptr[b], int(qo_len), int(kv_len), int(b)};
      KeepKVAttentionSM90 variant(params, block);
      if (variant.scale_pv != 1.f || variant.template GetAttentionUpdater<2>().sm_scale_log2 != variant.sm_scale_log2)
        return 3;
      for (uint32_t kv = 0; kv < kv_len + PADDING; ++kv)
        for (uint32_t q = h * group; q < (h + 1) * group; ++q) {
          const float x = variant.LogitsTransform(params, logits[at++], /*batch_idx=*/0, 0, kv, q, h);
          const float out[3] = {x, x * variant.sm_scale_log2, 1.f};
          fwrite(out, sizeof(float), 3, stdout);
        }
    }
#else
    PARAMS params{};
    params.sm_scale = scale[0];
    params.window_left = -1;
#ifndef RAGGED
    params.log_votes = votes.at;
    params.paged_kv.page_size.d = head[0];
    params.paged_kv.num_heads = kv_heads;
    params.paged_kv.indices = indices.at;
    params.paged_kv.indptr = indptr.at;
    params.paged_kv.last_page_len = last.at;
    const uint32_t kv_len = params.paged_kv.get_length(b);
#else
    const uint32_t kv_len = qo_len;
    params.kv_indptr = qo_indptr.at;
#endif
#ifdef PREFILL
    params.q_indptr = qo_indptr.at;
    params.maybe_custom_mask = mask.at;
    params.maybe_mask_indptr = mask_indptr.at;
#endif
    VARIANT variant(params, b, nullptr);
    evaluate(params, variant, logits, at, b, qo_len, kv_len, group, kv_heads, b);
#endif
  }
  return at == logits.n ? 0 : 2;
}
