#!/bin/sh
# One model over two hosts of eight GPUs each: sbatch examples/several_hosts/slurm.sh MODEL
# Keys come from: slora-jax key NAME --file keys.json
# A task on every host holds its eight GPUs; Slurm tells the launcher who is who.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-task=8
#SBATCH --kill-on-bad-exit=1

exec srun python -m sharding.launch --local-devices 0,1,2,3,4,5,6,7 \
    -m slora_jax serve "$1" --tp 16 --host 0.0.0.0 --api-keys keys.json
