"""Accuracies that others published for the networks; none of them is ours."""

_V1, _V2 = 'torchvision V1', 'torchvision V2'
_PAPER, _AUTHORS = 'paper', 'authors'
_QUOTED = 'paper, as ECA-Net quotes it'
_CIFAR = 'paper, CIFAR-10'
_COORDINATE = 'coordinate attention paper'

# Network -> accuracy in per cent and who says so: top-1 on ImageNet-1k, one crop, unless said
# otherwise. 'authors' is their repository or their paper; where the two differ, both are told.
PUBLISHED: dict[str, tuple[tuple[float, str], ...]] = {
    'resnet18': ((69.76, _V1),),
    'resnet34': ((73.31, _V1),),
    'resnet50': ((76.13, _V1), (80.86, _V2)),
    'resnet101': ((77.37, _V1), (81.89, _V2)),
    'resnet152': ((78.31, _V1), (82.28, _V2)),
    'resnext50_32x4d': ((77.62, _V1), (81.20, _V2)),
    'resnext101_32x8d': ((79.31, _V1), (82.83, _V2)),
    'wide_resnet50_2': ((78.47, _V1), (81.60, _V2)),
    'cifar_resnet20': ((91.25, _CIFAR),),
    'cifar_resnet32': ((92.49, _CIFAR),),
    'cifar_resnet44': ((92.83, _CIFAR),),
    'cifar_resnet56': ((93.03, _CIFAR),),
    'cifar_resnet110': ((93.57, f'{_CIFAR}, best of 5'),),
    'se_resnet50': ((77.06, 'moskomule/senet.pytorch'),),
    'se_resnet50_caffe': ((77.63, _AUTHORS), (76.71, _QUOTED)),
    'se_resnet101_caffe': ((78.25, _AUTHORS), (77.62, _PAPER)),
    'se_resnet152_caffe': ((78.66, _AUTHORS), (78.43, _PAPER)),
    'se_resnext50_caffe': ((79.03, _AUTHORS),),
    'se_resnext101_caffe': ((80.19, _AUTHORS),),
    'senet154_caffe': ((81.32, _AUTHORS),),
    'eca_resnet18': ((70.92, _AUTHORS),),
    'eca_resnet50': ((77.48, _PAPER), (77.42, _AUTHORS)),
    'eca_resnet101': ((78.65, _AUTHORS),),
    'eca_resnet152': ((78.92, _AUTHORS),),
    'cbam_resnet50': ((77.62, _AUTHORS),),
    'bam_resnet50': ((76.86, _AUTHORS),),
    'gc_resnet50_r16': ((77.70, _QUOTED),),
    'a2_resnet50_5_d2': ((77.0, _QUOTED),),
    'cgnl_resnet50_1': ((77.69, _AUTHORS),),
    'cgnl_resnet152_1': ((79.53, _AUTHORS),),
    'gsop_net1_resnet50': ((77.98, _AUTHORS), (77.68, _QUOTED)),
    'gsop_net2_resnet50': ((78.81, _AUTHORS),),
    'sknet50': ((79.21, _AUTHORS),),
    'sknet101': ((79.81, _AUTHORS),),
    'resnest50': ((81.03, _AUTHORS),),
    'resnest50_fast_1s1x64d': ((80.33, _AUTHORS),),
    'resnest50_fast_1s2x40d': ((80.59, _AUTHORS),),
    'resnest50_fast_1s4x24d': ((80.99, _AUTHORS),),
    'resnest50_fast_2s1x64d': ((80.53, _AUTHORS),),
    'resnest50_fast_2s2x40d': ((80.61, _AUTHORS),),
    'resnest50_fast_4s2x40d': ((81.14, _AUTHORS),),
    'resnest101': ((82.83, _AUTHORS),),
    'resnest200': ((83.84, _AUTHORS),),
    'resnest269': ((84.54, _AUTHORS),),
    'triplet_resnet18': ((71.09, _AUTHORS),),
    'triplet_resnet50': ((77.48, _AUTHORS),),
    'mobilenetv2': ((71.88, _V1), (72.15, _V2)),
    'eca_mobilenetv2': ((72.56, _AUTHORS),),
    'triplet_mobilenetv2': ((71.99, _AUTHORS),),
    'se_mobilenetv2_r24': ((73.5, _COORDINATE),),
    'cbam_mobilenetv2_r24': ((73.6, _COORDINATE),),
    'ca_mobilenetv2': ((74.3, _AUTHORS),),
}
