"""The zoo in Flax NNX."""

import functools
import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from tests.zoo import Built, X, example

IMAGES = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, 6), jnp.int32)


def built(make, *inputs) -> Built:
    """The model with its params apart; whatever else it has, such as running averages, is bound."""
    graphdef, params, rest = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, ...)
    rest = jax.tree.map(valued, rest)

    def apply(params, *inputs):
        return nnx.merge(graphdef, params, rest, copy=True)(*inputs)

    return apply, params, inputs


def valued(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    return jnp.zeros(leaf.shape, leaf.dtype)


def conv(features, out_features, size, rngs, **options):
    return nnx.Conv(features, out_features, (size, size), rngs=rngs, **options)


class BasicBlock(nnx.Module):
    def __init__(self, features, out_features, stride, rngs):
        self.conv1 = conv(features, out_features, 3, rngs, strides=stride, use_bias=False)
        self.bn1 = nnx.BatchNorm(out_features, rngs=rngs)
        self.conv2 = conv(out_features, out_features, 3, rngs, use_bias=False)
        self.bn2 = nnx.BatchNorm(out_features, rngs=rngs)
        projection = (
            conv(features, out_features, 1, rngs, strides=stride, use_bias=False),
            nnx.BatchNorm(out_features, rngs=rngs),
        )
        self.shortcut = nnx.Sequential(*projection) if stride > 1 else None

    def __call__(self, x):
        y = self.bn2(self.conv2(nnx.relu(self.bn1(self.conv1(x)))))
        return nnx.relu(y + (self.shortcut(x) if self.shortcut else x))


class ResNet18(nnx.Module):
    def __init__(self, rngs):
        self.conv = conv(3, 8, 3, rngs, use_bias=False)
        self.bn = nnx.BatchNorm(8, rngs=rngs)
        widths = [8, 8, 8, 16, 16, 32, 32, 64, 64]
        self.blocks = nnx.List(
            BasicBlock(before, after, after // before, rngs)
            for before, after in itertools.pairwise(widths)
        )
        self.fc = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        return self.fc(jnp.mean(x, axis=(1, 2)))


@example(
    # Two convolutions beside 5 identities and beside 3 projections.
    paths=(1 + X**2) ** 5 * (X + X**2) ** 3,
    roles={
        "input": r"conv/kernel",
        "hidden": r"blocks/\d/(conv\d|shortcut/layers/0)/kernel",
        "bias": r".*bias",
        "scale": r".*scale",
        "readout": r"fc/kernel",
    },
    fans={
        "conv/kernel": (9 * 3, 9 * 8),
        "blocks/2/conv1/kernel": (9 * 8, 9 * 16),
        "blocks/2/shortcut/layers/0/kernel": (8, 16),
    },
    linear="",
)
def resnet18() -> Built:
    return built(ResNet18, IMAGES)


class VGG(nnx.Module):
    def __init__(self, rngs):
        self.convs = nnx.List(
            conv(before, after, 3, rngs) for before, after in [(3, 8), (8, 8), (8, 16), (16, 16)]
        )
        self.fc1 = nnx.Linear(4 * 4 * 16, 32, rngs=rngs)
        self.fc2 = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        for layer, convolution in enumerate(self.convs):
            x = nnx.relu(convolution(x))
            if layer % 2:
                x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        return self.fc2(nnx.relu(self.fc1(x.reshape(len(x), -1))))


@example(
    paths=X**4,  # six layers in a row, stem and readout among them
    roles={
        "input": r"convs/0/kernel",
        "hidden": r"convs/[123]/kernel|fc1/kernel",
        "bias": r".*/bias",
        "readout": r"fc2/kernel",
    },
    fans={"convs/2/kernel": (9 * 8, 9 * 16), "fc1/kernel": (4 * 4 * 16, 32)},
    linear="",
)
def vgg() -> Built:
    return built(VGG, IMAGES)


class InvertedResidual(nnx.Module):
    def __init__(self, features, out_features, stride, rngs):
        wide = 4 * features
        self.expand = conv(features, wide, 1, rngs, use_bias=False)
        self.depthwise = conv(
            wide, wide, 3, rngs, strides=stride, feature_group_count=wide, use_bias=False
        )
        self.project = conv(wide, out_features, 1, rngs, use_bias=False)
        self.norms = nnx.List(nnx.BatchNorm(n, rngs=rngs) for n in (wide, wide, out_features))
        self.skip = stride == 1 and features == out_features

    def __call__(self, x):
        y = jax.nn.relu6(self.norms[0](self.expand(x)))
        y = jax.nn.relu6(self.norms[1](self.depthwise(y)))
        y = self.norms[2](self.project(y))
        return x + y if self.skip else y


class MobileNetV2(nnx.Module):
    def __init__(self, rngs):
        self.stem = conv(3, 8, 3, rngs, strides=2, use_bias=False)
        self.blocks = nnx.List(
            InvertedResidual(*sizes, rngs) for sizes in [(8, 8, 1), (8, 12, 2), (12, 12, 1)]
        )
        self.head = nnx.Linear(12, 10, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu6(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, axis=(1, 2)))


@example(
    paths=(1 + X**3) ** 2 * X**3,  # the block that changes width has no skip
    roles={
        "input": r"stem/kernel",
        "hidden": r"blocks/\d/(expand|depthwise|project)/kernel",
        "bias": r".*/bias",
        "scale": r".*/scale",
        "readout": r"head/kernel",
    },
    fans={
        "blocks/1/expand/kernel": (8, 32),
        "blocks/1/depthwise/kernel": (9, 9),
        "blocks/1/project/kernel": (32, 12),
    },
    linear=r"blocks/[12]/expand/kernel",  # bottlenecks are linear; the first block reads relu6
)
def mobilenet_v2() -> Built:
    return built(MobileNetV2, IMAGES)


class ConvNeXtBlock(nnx.Module):
    def __init__(self, features, rngs):
        self.depthwise = conv(features, features, 7, rngs, feature_group_count=features)
        self.norm = nnx.LayerNorm(features, rngs=rngs)
        self.fc1 = nnx.Linear(features, 4 * features, rngs=rngs)
        self.fc2 = nnx.Linear(4 * features, features, rngs=rngs)
        self.gamma = nnx.Param(jnp.full(features, 1e-6))

    def __call__(self, x):
        return x + self.gamma * self.fc2(nnx.gelu(self.fc1(self.norm(self.depthwise(x)))))


class ConvNeXt(nnx.Module):
    def __init__(self, rngs):
        self.patches = conv(3, 8, 4, rngs, strides=4)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.stage1 = nnx.List(ConvNeXtBlock(8, rngs) for _ in range(2))
        self.down_norm = nnx.LayerNorm(8, rngs=rngs)
        self.down = conv(8, 16, 2, rngs, strides=2)
        self.stage2 = nnx.List(ConvNeXtBlock(16, rngs) for _ in range(3))
        self.head_norm = nnx.LayerNorm(16, rngs=rngs)
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.patches(x))
        for block in self.stage1:
            x = block(x)
        x = self.down(self.down_norm(x))
        for block in self.stage2:
            x = block(x)
        return self.head(self.head_norm(jnp.mean(x, axis=(1, 2))))


@example(
    paths=(1 + X**3) ** 2 * X * (1 + X**3) ** 3,
    roles={
        "input": r"patches/kernel",
        "hidden": r"stage\d/\d/(depthwise|fc1|fc2)/kernel|down/kernel",
        "bias": r".*/bias",
        "scale": r".*/scale|stage\d/\d/gamma",
        "readout": r"head/kernel",
    },
    fans={
        "patches/kernel": (16 * 3, 16 * 8),
        "stage2/0/depthwise/kernel": (49, 49),
        "stage2/0/fc1/kernel": (16, 64),
        "down/kernel": (4 * 8, 4 * 16),
    },
    linear=r"stage\d/\d/(depthwise|fc1)/kernel|down/kernel",
)
def convnext() -> Built:
    return built(ConvNeXt, IMAGES)


class SqueezeExcitationBlock(nnx.Module):
    def __init__(self, features, rngs):
        self.conv1 = conv(features, features, 3, rngs, use_bias=False)
        self.bn1 = nnx.BatchNorm(features, rngs=rngs)
        self.conv2 = conv(features, features, 3, rngs, use_bias=False)
        self.bn2 = nnx.BatchNorm(features, rngs=rngs)
        self.squeeze = nnx.Linear(features, features // 4, rngs=rngs)
        self.excite = nnx.Linear(features // 4, features, rngs=rngs)

    def __call__(self, x):
        y = self.bn2(self.conv2(nnx.relu(self.bn1(self.conv1(x)))))
        gate = nnx.sigmoid(self.excite(nnx.relu(self.squeeze(jnp.mean(y, axis=(1, 2))))))
        return nnx.relu(x + y * gate[:, None, None])


class SENet(nnx.Module):
    def __init__(self, rngs):
        self.stem = conv(3, 8, 3, rngs)
        self.blocks = nnx.List(SqueezeExcitationBlock(8, rngs) for _ in range(3))
        self.head = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, axis=(1, 2)))


@example(
    paths=(1 + X**2 * (1 + X**2)) ** 3,  # two convolutions, times themselves or their gate
    roles={
        "input": r"stem/kernel",
        "hidden": r"blocks/\d/(conv1|conv2|squeeze|excite)/kernel",
        "bias": r".*/bias",
        "scale": r".*/scale",
        "readout": r"head/kernel",
    },
    fans={"blocks/0/squeeze/kernel": (8, 2), "blocks/0/excite/kernel": (2, 8)},
    linear=r"blocks/\d/squeeze/kernel",  # reads the mean of batch-normalized features
)
def squeeze_and_excitation() -> Built:
    return built(SENet, IMAGES)


class Darknet(nnx.Module):
    """Residual blocks that end in an activation, so that vertices sum activations."""

    def __init__(self, rngs):
        def layer(features, out_features, size):
            return nnx.Sequential(
                conv(features, out_features, size, rngs, use_bias=False),
                nnx.BatchNorm(out_features, rngs=rngs),
                functools.partial(nnx.leaky_relu, negative_slope=0.1),
            )

        self.stem = layer(3, 8, 3)
        self.blocks = nnx.List(nnx.Sequential(layer(8, 4, 1), layer(4, 8, 3)) for _ in range(3))
        self.head = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(jnp.mean(x, axis=(1, 2)))


@example(
    paths=(1 + X**2) ** 3,
    roles={
        "input": r"stem/layers/0/kernel",
        "hidden": r"blocks/\d/layers/[01]/layers/0/kernel",
        "bias": r".*/bias",
        "scale": r".*/scale",
        "readout": r"head/kernel",
    },
    fans={"blocks/1/layers/1/layers/0/kernel": (9 * 4, 9 * 8)},
    linear="",
    arrangement="activation",
)
def darknet() -> Built:
    return built(Darknet, IMAGES)
