import torch

from unimoe.applications.pictures import sheet


def test_a_sheet_is_filled_row_by_row():
    images = torch.stack([torch.full((3, 8, 8), value) for value in (-1.0, 1.0, 5.0)])
    page = sheet(images, columns=2, scale=1)
    assert page.size == (24, 24)
    assert page.getpixel((6, 6)) == (0, 0, 0) and page.getpixel((18, 6)) == (255, 255, 255)
