"""Models by name: sizes and names of their parameters, and that each trains on our layers."""

from __future__ import annotations

import copy
from math import sqrt

import pytest
import torch

import gdfast
from gdfast import models, nn

# Options and image sizes with which each kind trains quickly.
TRAINED = {
    "cnn": ({}, (2, 1, 28, 28)),
    "face_resnet": ({"features": 4, "width": 8}, (5, 1, 40, 36)),
    "mobilenet_v2": ({"num_classes": 4, "dropout": 0.0}, (2, 3, 64, 64)),
    "resnet18": ({"num_classes": 4}, (2, 3, 64, 64)),
    "resnet20": ({"num_classes": 4, "in_channels": 1}, (2, 1, 16, 16)),
    "resnet50": ({"num_classes": 4}, (2, 3, 64, 64)),
    "yolo_lite_backbone": ({"num_classes": 4}, (2, 3, 96, 64)),
}
DEPTHS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
    "resnet20": (3, 3, 3),
    "resnet32": (5, 5, 5),
    "resnet56": (9, 9, 9),
}
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnet20": 272_474,
    "resnet32": 466_906,
    "resnet56": 855_770,
    "mobilenet_v2": 3_504_872,
    "yolo_lite": 3_270_139,
    "yolo_lite_backbone": 2_358_096,
    "face_resnet": 2_799_712,
}

Shapes = dict[str, tuple[int, ...]]


def _conv(name: str, K: int, C: int, R: int) -> Shapes:
    return {f"{name}.weight": (K, C, R, R)}


def _norm(name: str, channels: int) -> Shapes:
    names = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{part}": (channels,) for part in names} | {f"{name}.num_batches_tracked": ()}


def _linear(name: str, K: int, C: int) -> Shapes:
    return {f"{name}.weight": (K, C), f"{name}.bias": (K,)}


def resnet_state(name: str) -> Shapes:
    """Names and shapes of the state of torchvision's ResNets, and of CIFAR's in the same style."""
    depths = DEPTHS[name]
    cifar, bottleneck = len(depths) == 3, name in ("resnet50", "resnet101", "resnet152")
    C = 16 if cifar else 64
    state = _conv("conv1", C, 3, 3 if cifar else 7) | _norm("bn1", C)
    for stage, depth in enumerate(depths):
        width = (16 if cifar else 64) << stage
        out = 4 * width if bottleneck else width
        for index in range(depth):
            block = f"layer{stage + 1}.{index}"
            kernels = ((width, 1), (width, 3), (out, 1)) if bottleneck else ((width, 3),) * 2
            inputs = C
            for position, (outputs, kernel) in enumerate(kernels, 1):
                state |= _conv(f"{block}.conv{position}", outputs, inputs, kernel)
                state |= _norm(f"{block}.bn{position}", outputs)
                inputs = outputs
            if index == 0 and out != C:
                state |= _conv(f"{block}.downsample.0", out, C, 1)
                state |= _norm(f"{block}.downsample.1", out)
            C = out
    return state | _linear("fc", 10 if cifar else 1000, C)


def mobilenet_state() -> Shapes:
    """Names and shapes of the state of torchvision's mobilenet_v2."""
    state = _conv("features.0.0", 32, 3, 3) | _norm("features.0.1", 32)
    blocks = [(16, 1), *[(24, 6)] * 2, *[(32, 6)] * 3, *[(64, 6)] * 4]
    blocks += [*[(96, 6)] * 3, *[(160, 6)] * 3, (320, 6)]
    C = 32
    for index, (out, expansion) in enumerate(blocks, 1):
        name, width, part = f"features.{index}.conv", C * expansion, 0
        if expansion > 1:
            state |= _conv(f"{name}.0.0", width, C, 1) | _norm(f"{name}.0.1", width)
            part = 1
        state |= _conv(f"{name}.{part}.0", width, 1, 3) | _norm(f"{name}.{part}.1", width)
        state |= _conv(f"{name}.{part + 1}", out, width, 1) | _norm(f"{name}.{part + 2}", out)
        C = out
    state |= _conv("features.18.0", 1280, C, 1) | _norm("features.18.1", 1280)
    return state | _linear("classifier.1", 1000, 1280)


def _without_memory(name: str, **options: object) -> torch.nn.Module:
    with torch.device("meta"):
        return models.create(name, **options)


def test_the_names_are_known() -> None:
    assert set(models.names()) == {*TRAINED, *PARAMETERS}


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name: str) -> None:
    assert sum(p.numel() for p in _without_memory(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", [*DEPTHS, "mobilenet_v2"])
def test_states_are_torchvision_s(name: str) -> None:
    expected = mobilenet_state() if name == "mobilenet_v2" else resnet_state(name)
    found = {key: tuple(value.shape) for key, value in _without_memory(name).state_dict().items()}
    assert list(found.items()) == list(expected.items())


@pytest.mark.parametrize("name", TRAINED)
def test_a_model_trains_on_our_layers(name: str) -> None:
    options, shape = TRAINED[name]
    model = models.create(name, **options)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert convolutions and all(type(m) is nn.Conv2d for m in convolutions)
    logits = model(torch.randn(shape))
    assert logits.shape == (shape[0], 10 if name == "cnn" else 4)
    logits.pow(3).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("name", TRAINED)
def test_a_restored_model_is_plain_pytorch_and_computes_the_same(name: str) -> None:
    options, shape = TRAINED[name]
    ours = models.create(name, **options).double()
    plain = copy.deepcopy(ours)
    gdfast.restore_(plain)
    containers = {
        "gdfast.models." + module for module in ("cnn", "face", "mobilenet", "resnet", "yolo_lite")
    }
    for module in plain.modules():
        where = type(module).__module__
        assert where in containers or where.startswith("torch.nn."), type(module)
    images = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(ours(images), plain(images))
    # The second time with the running statistics that the first has left.
    torch.testing.assert_close(ours.eval()(images), plain.eval()(images))


def test_the_cnn_is_the_article_s() -> None:
    class Article(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = torch.nn.Conv2d(1, 32, 3)
            self.fc = torch.nn.Linear(32 * 13 * 13, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.conv1(x))
            x = torch.nn.functional.max_pool2d(x, 2)
            return self.fc(x.view(x.size(0), -1))

    torch.manual_seed(3)
    theirs = Article()
    torch.manual_seed(3)
    ours = models.create("cnn")
    # The same draws in the same order, so one seed starts both at the same weights.
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    images = torch.randn(5, 1, 28, 28)
    torch.testing.assert_close(ours(images), theirs(images))
    gdfast.restore_(ours)
    assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2"])
def test_convolutions_start_by_their_outputs(name: str) -> None:
    model = models.create(name)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 2000:
            K, _, R, S = module.weight.shape
            expected = sqrt(2 / (K * R * S))
            tolerance = 4 / sqrt(2 * module.weight.numel())  # four standard errors
            assert module.weight.std().item() == pytest.approx(expected, rel=tolerance)
        elif isinstance(module, torch.nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()


def test_mobilenet_starts_its_classifier_as_torchvision_does() -> None:
    linear = models.create("mobilenet_v2").classifier[1]
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert (linear.bias == 0).all()


@pytest.mark.parametrize(("name", "last"), [("resnet20", "bn2"), ("resnet50", "bn3")])
def test_zero_init_residual(name: str, last: str) -> None:
    state = models.create(name, zero_init_residual=True).state_dict()
    for key, value in state.items():
        if "bn" in key and key.endswith(".weight"):
            assert (value == (0 if f".{last}." in key else 1)).all(), key


def test_bottlenecks_have_their_stride_on_the_3x3() -> None:
    block = _without_memory("resnet50").layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))


@pytest.mark.parametrize(("width", "stem", "last"), [(0.35, 16, 1280), (1.4, 48, 1792)])
def test_width_of_mobilenet(width: float, stem: int, last: int) -> None:
    features = _without_memory("mobilenet_v2", width=width).features
    assert features[0][0].out_channels == stem
    assert features[18][0].out_channels == last
    channels = [m.out_channels for m in features.modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(count % 8 == 0 for count in channels)


@pytest.mark.parametrize("size", [(96, 64), (70, 45)])
def test_the_backbone_s_maps_have_its_channels_and_strides(size: tuple[int, int]) -> None:
    backbone = _without_memory("yolo_lite_backbone", in_channels=1)
    maps = backbone(torch.empty(2, 1, *size, device="meta"))
    for channels, stride, map in zip(backbone.channels, backbone.strides, maps, strict=True):
        assert map.shape == (2, channels, *(-(-side // stride) for side in size))


@pytest.mark.parametrize("size", [(112, 92), (64, 64), (33, 20)])
def test_face_embeddings_have_length_one_whatever_the_light(size: tuple[int, int]) -> None:
    model = models.create("face_resnet", width=4, in_channels=3).eval()
    images = torch.rand(3, 3, *size) / 2
    embeddings = model(images)
    assert embeddings.shape == (3, 512)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(model(0.5 * images + 0.4), embeddings, atol=1e-2, rtol=0)
    assert model(torch.zeros(1, 3, *size)).isfinite().all()
    half = model.bfloat16()(images.bfloat16()).float()
    torch.testing.assert_close(half.norm(dim=1), torch.ones(3), atol=1e-2, rtol=0)


def test_options_that_no_model_has_are_refused() -> None:
    with pytest.raises(TypeError, match="colour"):
        models.create("resnet18", colour=1)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"expected one of .*cnn.*got 'cnm'"):
        models.create("cnm")


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="'cnn', which is taken"):
        models.register("cnn")(models.SimpleCNN)
