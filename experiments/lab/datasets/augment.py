"""Random batches and image augmentation, as pure functions of a key; all run on the device."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Num, PRNGKeyArray

Images = Num[Array, "batch height width channels"]


@jax.jit
def random_flip(key: PRNGKeyArray, images: Images) -> Images:
    """Mirrors each image left to right with probability one half.

    Args:
      key: Random key.
      images: `[N, H, W, C]`.

    Returns:
      `[N, H, W, C]`, of the same type.
    """
    is_flipped = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(is_flipped, images[:, :, ::-1, :], images)


@functools.partial(jax.jit, static_argnames="padding")
def random_crop(key: PRNGKeyArray, images: Images, padding: int) -> Images:
    """Shifts each image by up to `padding` pixels in both directions, filling up with zeros.

    Each image is padded with zeros on all four sides and cropped to its old size at a place drawn
    uniformly. Zero is the mean of the training set if images are standardised.

    Args:
      key: Random key.
      images: `[N, H, W, C]`.
      padding: Pixels added on every side; 0 changes nothing.

    Returns:
      `[N, H, W, C]`, of the same type.

    Raises:
      ValueError: If `padding` is negative.
    """
    if padding < 0:
        raise ValueError(f"padding must be 0 or more, found {padding}")
    if padding == 0:
        return images
    number, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    offsets = jax.random.randint(key, (number, 2), 0, 2 * padding + 1)

    def crop(image: Array, offset: Array) -> Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (height, width, channels))

    return jax.vmap(crop)(padded, offsets)


@functools.partial(jax.jit, static_argnames=("flip", "padding"))
def augment(key: PRNGKeyArray, images: Images, *, flip: bool, padding: int) -> Images:
    """The usual augmentation of small images: a random shift, then a random mirroring.

    Args:
      key: Random key.
      images: `[N, H, W, C]`.
      flip: Whether to apply `random_flip`; wrong for digits, which are not symmetric.
      padding: What `random_crop` pads with; 0 leaves the shift out.

    Returns:
      `[N, H, W, C]`, of the same type.

    Raises:
      ValueError: If `padding` is negative.
    """
    crop_key, flip_key = jax.random.split(key)
    images = random_crop(crop_key, images, padding)
    return random_flip(flip_key, images) if flip else images


@functools.partial(jax.jit, static_argnames=("num_examples", "batch_size"))
def epoch_indices(
    key: PRNGKeyArray, num_examples: int, batch_size: int
) -> Int32[Array, "num_batches batch_size"]:
    """Splits a random order of all examples into batches; the last incomplete one is dropped.

    Args:
      key: Random key.
      num_examples: Size of the data set.
      batch_size: Examples per batch.

    Returns:
      int32 `[num_examples // batch_size, batch_size]`, every index at most once.

    Raises:
      ValueError: If `batch_size` is below 1 or above `num_examples`.
    """
    if not 1 <= batch_size <= num_examples:
        raise ValueError(
            f"batch_size must lie between 1 and the {num_examples} examples, found {batch_size}"
        )
    num_batches = num_examples // batch_size
    order = jax.random.permutation(key, jnp.arange(num_examples, dtype=jnp.int32))
    return order[: num_batches * batch_size].reshape(num_batches, batch_size)
