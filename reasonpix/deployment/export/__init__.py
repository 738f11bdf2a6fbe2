"""Export of networks to ONNX, OpenVINO and TensorRT, with proof of parity."""
