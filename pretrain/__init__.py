"""Imglish: pretraining of BEiT-3- and VLMo-class vision-language encoders."""
