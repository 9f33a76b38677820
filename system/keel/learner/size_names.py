"""Names under which configurations keep their sizes: families share most of them."""


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WIDTHS = ("hidden_size", "n_embd", "d_model", "emb_dim")
"""The width of the model."""
HEADS = _names(
    "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads num_decoder_attention_heads"
)
"""The number of attention heads, the first one that a configuration has."""
OTHER_HEADS = ("encoder_attention_heads", "num_encoder_attention_heads", "swa_num_attention_heads", "linear_num_heads")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads")
"""The number of heads of keys and values."""
HEAD_WIDTHS = ("head_dim", "kv_channels", "d_head", "dim_head", "attention_head_dim", "swa_head_dim", "d_kv")
OTHER_WIDTHS = _names("""
    attention_hidden_size embedding_dim embedding_size input_embedding_size lru_width output_embedding_size
    word_embed_proj_dim
""")
"""Widths that are the model's own or in a simple relation to it."""
INNER_WIDTHS = _names("""
    d_ff d_inner decoder_ffn_dim dense_intermediate_size dff dim_ff encoder_ffn_dim expert_ffn_hidden_size
    feed_forward_size ffn_dim ffn_hidden_size intermediate_size intermediate_size_mlp moe_intermediate_size
    moe_shared_expert_intermediate_size n_inner prefix_dense_intermediate_size shared_expert_intermediate_size
    shared_intermediate_size
""")
"""Widths inside feed-forward layers and experts."""
LENGTHS = _names("""
    context_length max_position_embeddings max_seq_len max_target_positions model_max_length n_ctx n_positions
    seq_length
""")
"""The number of positions."""
WINDOWS = _names("""
    attention_chunk_size attention_window_size block_size chunk_size floor_scale keep_window_size local_attention
    local_attn_chunk_length lsh_attn_chunk_length mamba_chunk_size rel_extent sliding_window sliding_window_size
    window_size
""")
"""Lengths along the sequence at which a layer changes what it does: a row must be longer than each of them."""
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_A_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
EXPERT_GROUPS = ("n_group", "num_expert_group")
SSM_HEADS = (
    ("mamba_n_heads", "mamba_d_head", "mamba_n_groups"),
    ("mamba_num_heads", "mamba_head_dim", "n_groups"),
    ("n_mamba_heads", "mamba_headdim", "mamba_ngroups"),
)
"""State space layers: the number of heads, the width of one, the number of groups."""
_BY_LIMIT = {
    2: "index_topk_blocks zero_expert_num",
    4: "centroid_intermediate_top_k index_block_size",
    8: "index_topk indexer_budget qk_rope_head_dim",
    16: """block_multiple_of hidden_size_per_layer_input index_head_dim index_n_heads indexer_head_dim linear_head_dim
        mamba_d_state num_centroids qk_nope_head_dim ssm_state_size state_size""",
    32: "moe_latent_size ple_embed_dim router_hidden_size",
    512: "encoder_hash_byte_group_vocab",
}
AT_MOST = {name: limit for limit, names in _BY_LIMIT.items() for name in names.split()}
"""Sizes and selections that hold for themselves: no other size follows from them."""
