"""The ViT block that encoder and pixel decoder share: timm's, with attention from mug.kernels.

Dimension letters: B batch, N tokens, D width, H heads.
"""

from functools import partial

from timm.layers import Attention
from timm.layers import Mlp as TimmMlp
from timm.models import vision_transformer
from torch import Tensor, nn

from mug.kernels.attention import attention
from mug.model.recompute import linear_of, run_block

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class SelfAttention(Attention):
    """timm's attention (parameters `qkv`, `proj`) on the project's kernel, of the normalised x."""

    recompute = "nothing"

    def forward(self, x_BND: Tensor, norm: nn.Module) -> Tensor:
        B, N, _ = x_BND.shape
        qkv = linear_of(norm, self.qkv, self.recompute, x_BND)
        q_BNHD, k_BNHD, v_BNHD = qkv.view(B, N, 3, self.num_heads, -1).unbind(2)
        return self.proj(attention(q_BNHD, k_BNHD, v_BNHD).reshape(B, N, -1))


class Mlp(TimmMlp):
    """timm's MLP (parameters `fc1`, `fc2`), of the normalised x."""

    recompute = "nothing"

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        hidden = linear_of(norm, self.fc1, self.recompute, x)
        return linear_of(self.act, self.fc2, self.recompute, hidden)


class Block(vision_transformer.Block):
    """A pre-norm ViT block with timm's parameter names, MLP of 4 x width; stochastic depth where it is put in."""

    recompute = "nothing"

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads, qkv_bias=True, norm_layer=LayerNorm, mlp_layer=Mlp)
        self.attn = SelfAttention(width, heads, qkv_bias=True)

    def forward(self, x_BND: Tensor) -> Tensor:
        return run_block(self._layers, self.recompute, x_BND)

    def _layers(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.drop_path1(self.attn(x_BND, self.norm1))
        return x_BND + self.drop_path2(self.mlp(x_BND, self.norm2))


def init_weights(module: nn.Module) -> None:
    """MAE's initialisation: Xavier-uniform linear layers, zero biases; normal(0.02) embeddings."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
