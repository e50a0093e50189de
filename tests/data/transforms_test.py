import io

import numpy as np
import pytest
from PIL import Image

from attention_jax.data import transforms


def test_grey_files_become_rgb_and_arrays_pass_through():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4, 1)
    assert transforms.to_array(transforms.to_picture(grey, 1)).tolist() == grey.tolist()

    file = io.BytesIO()
    Image.fromarray(grey[..., 0]).save(file, 'png')
    rgb = transforms.to_array(transforms.to_picture(file.getvalue(), 3))
    np.testing.assert_array_equal(rgb, np.repeat(grey, 3, -1))


def test_pictures_of_more_than_eight_bits():
    ramp = np.array([[0, 255, 256, 40000, 65535]], np.uint16)
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, 'PNG')
    rgb = transforms.to_array(transforms.to_picture(file.getvalue(), 3))
    np.testing.assert_array_equal(rgb, np.repeat((ramp >> 8)[..., None], 3, -1))
    for other in (np.zeros((2, 3), np.float32), np.zeros((2, 3), np.int32)):
        with pytest.raises(ValueError, match='has no known range of brightness'):
            transforms.convert(Image.fromarray(other))
