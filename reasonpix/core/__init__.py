"""Files, images, text and hashing: what every other package stands on."""
