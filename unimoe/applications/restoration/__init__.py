"""Rain, haze and snow are removed from images: MoFME beside FFN experts and a dense model."""
