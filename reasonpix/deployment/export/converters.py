"""Convert the networks of an editing model to ONNX or OpenVINO files.

`torch.export` traces a network with dynamic batch, height, width and number of tokens. The same
weights and package versions give the same files.
"""

from __future__ import annotations

import copy
import hashlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from reasonpix.editing.checkpoint import LoadedModel
from reasonpix.editing.pipeline_parts import vae_scale_factor
from reasonpix.editing.runtimes.binding import resolve_shape
from reasonpix.editing.runtimes.manifest import Dtype, Graph, Part, Port, Precision, Shapes
from reasonpix.editing.runtimes.modules import (
    PlainAttention,
    UNetGraph,
    VaeDecoderGraph,
    VaeEncoderGraph,
)
from reasonpix.editing.runtimes.names import Format
from reasonpix.editing.runtimes.openvino import import_openvino

_TRACED = {"batch": 3, "height": 2, "width": 3, "sequence": 5}
"""Sizes used for tracing, all different, because equal ones would be merged into one dimension.
Height and width are in cells of the UNet's coarsest level."""

_OPSET, _OPSET_OF_BFLOAT16 = 20, 22
"""ONNX versions. The older one is optimised best, but has no bfloat16 convolution."""

_BLOCK = 32
"""Weights per int8 scale; larger blocks would hardly make the file smaller."""

_DTYPES: dict[Precision, Dtype] = {"fp16": "float16", "bf16": "bfloat16"}


def convert(
    checkpoint: LoadedModel,
    format: Format,
    precision: Precision,
    parts: Sequence[Part],
    folder: Path,
) -> dict[Part, Graph]:
    """Write the networks `parts` into `folder`; the checkpoint stays on the CPU in float32.

    Weights go to a separate file (`unet.onnx.data`, `unet.bin`), as those above 2 GB must.
    """
    graphs: dict[Part, Graph] = {}
    for part in parts:
        # OpenVINO casts internally; ONNX inputs and outputs have the precision of the network.
        dtype = "float32" if format == "openvino" else _DTYPES.get(precision, "float32")
        suffix = "xml" if format == "openvino" else "onnx"
        graph = graphs[part] = describe(checkpoint, part, f"{part}.{suffix}", dtype)
        # The VAE is small and its errors are visible, so int8 is for the UNet only.
        reduced = "fp32" if precision == "int8" and part != "unet" else precision
        with quiet():
            if format == "openvino":
                with TemporaryDirectory(dir=folder) as traced:
                    file = Path(traced, f"{part}.onnx")
                    _write_onnx(checkpoint, part, graph, file, PlainAttention())
                    _write_openvino(file, folder / graph.file, reduced)
            else:
                # The fused operator may not support bfloat16 everywhere.
                fused = format == "onnx" and precision != "bf16"
                attention = _FusedAttention() if fused else PlainAttention()
                _write_onnx(checkpoint, part, graph, folder / graph.file, attention)
                if reduced == "int8":
                    _quantise_onnx(folder / graph.file)
    return graphs


def describe(checkpoint: LoadedModel, part: Part, file: str, dtype: Dtype) -> Graph:
    """Inputs and output of a network, as in `reasonpix.editing.runtimes.modules`."""
    unet, times = checkpoint.model.unet.config, vae_scale_factor(checkpoint.vae)
    pixels = Port(
        name="pixels", dtype=dtype, shape=("batch", 3, f"{times}*height", f"{times}*width")
    )
    latents = Port(
        name="latents", dtype=dtype, shape=("batch", unet.out_channels, "height", "width")
    )
    if part == "vae_encoder":
        return Graph(file=file, inputs=(pixels,), output=latents)
    if part == "vae_decoder":
        return Graph(file=file, inputs=(latents,), output=pixels)
    tokens = ("batch", "sequence")
    return Graph(
        file=file,
        inputs=(
            Port(name="sample", dtype=dtype, shape=("batch", unet.in_channels, "height", "width")),
            Port(name="timestep", dtype="float32", shape=("batch",)),
            Port(
                name="encoder_hidden_states",
                dtype=dtype,
                shape=(*tokens, unet.cross_attention_dim),
            ),
            Port(name="encoder_attention_mask", dtype="bool", shape=tokens),
        ),
        output=latents.model_copy(update={"name": "prediction"}),
    )


def stride(checkpoint: LoadedModel) -> int:
    """Side of a cell of the UNet's coarsest level, in latents."""
    return int(2 ** (len(checkpoint.model.unet.config.block_out_channels) - 1))


def profile(checkpoint: LoadedModel) -> Shapes:
    """The input shapes that the TensorRT engine supports: smallest, optimal, largest.

    Batches of up to eight edits with three branches each, the default on a GPU, and sides up to the
    model's resolution. TensorRT reserves memory for the largest shape.
    """
    step = stride(checkpoint)
    # The longer side of an image is rounded the same way.
    cells = round(checkpoint.settings.resolution / (vae_scale_factor(checkpoint.vae) * step))
    side = max(1, cells) * step
    sides = (step, side, side)
    tokens = checkpoint.model.connector.config.tokens, len(checkpoint.model.uncond_states)
    # A long instruction has a multiple of the tokens of an empty one.
    sequence = (min(tokens), max(tokens), 8 * max(tokens))
    return Shapes(batch=(1, 24, 24), height=sides, width=sides, sequence=sequence)


def weights_digest(unet: nn.Module) -> str:
    """SHA-256 over names, shapes and float32 values, independent of how they are stored."""
    digest = hashlib.sha256()
    for name, tensor in sorted(unet.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.float().contiguous().cpu().numpy()).cast("B"))
    return digest.hexdigest()


# -- ONNX -----------------------------------------------------------------------------------------


def _write_onnx(
    checkpoint: LoadedModel, part: Part, graph: Graph, file: Path, attention: PlainAttention
) -> None:
    import onnx

    sizes = {
        name: size * (stride(checkpoint) if name in ("height", "width") else 1)
        for name, size in _TRACED.items()
    }
    bfloat16 = graph.output.dtype == "bfloat16"
    dtype = getattr(torch, graph.output.dtype)
    with _module(checkpoint, part, dtype, attention) as module, torch.no_grad():
        program = torch.onnx.export(
            module,
            tuple(_example(port, sizes) for port in graph.inputs),
            dynamo=True,
            opset_version=_OPSET_OF_BFLOAT16 if bfloat16 else _OPSET,
            input_names=[port.name for port in graph.inputs],
            output_names=[graph.output.name],
            dynamic_shapes={
                port.name: {
                    number: side.rpartition("*")[2]
                    for number, side in enumerate(port.shape)
                    if isinstance(side, str)
                }
                for port in graph.inputs
            },
            verbose=False,
        )
        _strip_metadata(program.model)
        program.save(str(file), external_data=True)
    onnx.checker.check_model(str(file), full_check=True)


class _FusedAttention(PlainAttention):
    """Self-attention as ONNX Runtime's `com.microsoft` operator, which needs less memory.

    Cross-attention, which has a mask and fewer scores, stays plain ONNX.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """As `PlainAttention`."""
        if encoder_hidden_states is not None or attention_mask is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)
        query, key, value = (
            project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        attended = torch.onnx.ops.symbolic(
            "com.microsoft::MultiHeadAttention",
            (query, key, value),
            {"num_heads": attn.heads, "scale": attn.scale},
            dtype=query.dtype,
            shape=query.shape,
            version=1,
        )
        output: Tensor = attn.to_out[0](attended)
        return output


@contextmanager
def _module(
    checkpoint: LoadedModel, part: Part, dtype: torch.dtype, attention: PlainAttention
) -> Iterator[nn.Module]:
    """The network prepared for tracing; the checkpoint's own is restored afterwards."""
    unet, vae = checkpoint.model.unet, checkpoint.vae
    if part != "unet":
        own = vae if dtype == torch.float32 else nn.Module.to(copy.deepcopy(vae), dtype)
        yield (VaeEncoderGraph if part == "vae_encoder" else VaeDecoderGraph)(own).eval()
        return
    own = unet if dtype == torch.float32 else copy.deepcopy(unet).to(dtype)
    processors = dict(own.attn_processors)
    own.set_attn_processor(attention)
    try:
        yield UNetGraph(own).eval()
    finally:
        own.set_attn_processor(processors)


def _example(port: Port, sizes: dict[str, int]) -> torch.Tensor:
    return torch.ones(resolve_shape(port, sizes), dtype=getattr(torch, port.dtype))


def _strip_metadata(model: Any) -> None:
    """Remove paths and process ids that the exporter records for each node."""
    for node in model.graph.all_nodes():
        node.doc_string = None
        node.metadata_props.clear()
        for output in node.outputs:
            output.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def _quantise_onnx(file: Path) -> None:
    """Quantise the weights of matrix products to int8; activations stay float32.

    onnxruntime has no tool that quantises only the weights of convolutions.
    """
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(file), bits=8, block_size=_BLOCK, is_symmetric=True)
    quantizer.process()
    Path(f"{file}.data").unlink()  # or the new weights would be appended to it
    quantizer.model.save_model_to_file(str(file), use_external_data_format=True)


# -- OpenVINO -------------------------------------------------------------------------------------


def _write_openvino(onnx: Path, file: Path, precision: Precision) -> None:
    openvino = import_openvino()
    model = openvino.convert_model(onnx)
    if precision == "int8":
        import nncf

        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    for number, node in enumerate(model.get_ordered_ops()):
        # Unnamed nodes get numbers that depend on everything the process converted before.
        if re.fullmatch(r"[A-Z]\w*_\d+", node.get_friendly_name()):
            node.set_friendly_name(f"{node.get_type_name()}.{number}")
    openvino.save_model(model, file, compress_to_fp16=precision == "fp16")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the output, warnings and logs of exporters and converters."""
    root = logging.getLogger()
    before, handlers, level = logging.root.manager.disable, list(root.handlers), root.level
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        root.handlers[:] = handlers  # onnxruntime.quantization adds one when it is imported
        root.setLevel(level)
