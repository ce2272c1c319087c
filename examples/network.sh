# shellcheck shell=bash
# NCCL settings for clusters whose network it does not find out by itself. Everything is off: without this file NCCL and this project choose
# for themselves, which is right on most machines. Copy it, remove the # before what your network needs, and source the copy on each node
# before Ray starts there (in examples/slurm/megatron_aspo.sbatch: SETUP_COMMAND="source my_network.sh"). Measure before and after.

## Which interface: where a node has several, and connections go over the wrong one or time out.
#export NCCL_SOCKET_IFNAME=eth0        # NCCL's bootstrap, and its traffic where there is no RDMA
#export GLOO_SOCKET_IFNAME=eth0        # process groups of the CPU; the same interface

## InfiniBand and RoCE: where NCCL_DEBUG=INFO says NET/Socket although the node has RDMA adapters, or takes the wrong ones.
#export NCCL_IB_HCA=mlx5               # adapters whose names begin so; ^mlx5_2 leaves one out (a storage network, say)
#export NCCL_IB_DISABLE=1              # a broken RDMA network: fall back to sockets, much slower

## RoCE alone: where RDMA connections fail although InfiniBand's tools see the adapters. Ask who runs the network.
#export NCCL_IB_GID_INDEX=3            # the address of RoCE v2 in the adapter's table (show_gids lists it); NCCL 2.21 and later finds it
#export NCCL_IB_TC=106                 # traffic class whose packets the switches do not drop
#export NCCL_IB_TIMEOUT=22             # retries for longer, on a large or busy fabric

## Throughput: where transfers between nodes stay far below the adapters' speed.
#export NCCL_IB_QPS_PER_CONNECTION=4   # several queue pairs for each connection, where the switches balance paths by flow
#export NCCL_MIN_NCHANNELS=16          # more channels, at the price of GPU memory and cores
#export NCCL_NET_GDR_LEVEL=SYS         # adapter and GPU exchange data directly even where they lie far apart

## Between the GPUs of one node. Turning these off, as some launch scripts do, slows every collective within a node. Only to find a fault:
#export NCCL_P2P_DISABLE=1             # hangs at the first collective with PCIe access control (ACS) or some virtual machines
#export NCCL_SHM_DISABLE=1             # /dev/shm of a container is too small; better: give it room

## To see what NCCL chose, and why something hangs.
#export NCCL_DEBUG=INFO                # one line for each connection: NET/IB, NET/Socket, P2P, SHM
