"""The ViT block that encoder and pixel decoder share: timm's, with attention from mug.kernels."""

from functools import partial

from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mug.kernels.attention import attention

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class SelfAttention(Attention):
    """timm's attention (parameters `qkv`, `proj`) on the project's kernel."""

    def forward(self, x_BND: Tensor, **unused: object) -> Tensor:
        B, N, _ = x_BND.shape
        q_BNHD, k_BNHD, v_BNHD = self.qkv(x_BND).view(B, N, 3, self.num_heads, -1).unbind(2)
        return self.proj(attention(q_BNHD, k_BNHD, v_BNHD).reshape(B, N, -1))


def vit_block(width: int, heads: int) -> Block:
    """A pre-norm ViT block with timm's parameter names, MLP of 4 x width."""
    block = Block(width, heads, qkv_bias=True, norm_layer=LayerNorm)
    block.attn = SelfAttention(width, heads, qkv_bias=True)
    return block


def init_weights(module: nn.Module) -> None:
    """MAE's initialisation: Xavier-uniform linear layers, zero biases; normal(0.02) embeddings."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
