{{/* Refuses values that contradict each other. values.schema.json says what each alone may be. */}}
{{- define "lorafleet.checks" -}}
{{- $fleet := .Values.fleet -}}
{{- if not $fleet.model }}{{ fail "fleet.model is empty; give a directory on a volume or a Hugging Face id." }}{{ end -}}
{{- if not (regexMatch "^[a-z]" (include "lorafleet.fullname" .)) }}
{{- fail (printf "The release is called %q; KubeRay needs a name that begins with a letter." .Release.Name) }}
{{- end -}}
{{- include "lorafleet.checkPath" (dict "root" . "value" "fleet.model" "path" $fleet.model) -}}
{{- range $fleet.loraModules }}
{{- include "lorafleet.checkPath" (dict "root" $ "value" (printf "fleet.loraModules: %s" .name) "path" .path) -}}
{{- end -}}
{{- if and $fleet.loraModules (not $fleet.enableLora) }}
{{- fail "fleet.loraModules is given with fleet.enableLora false, where it would have no effect." }}
{{- end -}}
{{- $taken := list "--served-model-name" "--device" "--num-workers" "--tensor-parallel-size" "--drain-timeout-s" "--worker-ports" "--enable-lora" "--lora-modules" "--ray-address" "--gateways" "--controller-port" "--token-file" "--follow" "--host" "--port" "--tenants" "--api-key" -}}
{{- range $fleet.flags }}
{{- if has (regexFind "^--[a-z-]+" .) $taken }}
{{- fail (printf "fleet.flags has %q, which the chart sets itself; use the chart's value for it, if there is one." .) }}
{{- end }}
{{- end -}}
{{- $takenByGateways := list "--controller" "--token-file" "--host" "--port" "--tenants" "--api-key" "--drain-timeout-s" "--reuse-port" "--exit-with-parent" -}}
{{- range .Values.gateway.flags }}
{{- if has (regexFind "^--[a-z-]+" .) $takenByGateways }}
{{- fail (printf "gateway.flags has %q, which the chart sets itself." .) }}
{{- end }}
{{- end -}}
{{- $ranks := mul $fleet.numWorkers $fleet.tensorParallelSize -}}
{{- if eq .Values.mode "cluster" -}}
{{- include "lorafleet.checkGroups" (dict "root" . "ranks" $ranks) -}}
{{- else -}}
{{- if and (eq $fleet.device "cuda") (ne (int .Values.pod.gpus) (int $ranks)) }}
{{- fail (printf "pod.gpus is %v; fleet.numWorkers %v of fleet.tensorParallelSize %v need %v." .Values.pod.gpus $fleet.numWorkers $fleet.tensorParallelSize $ranks) }}
{{- end -}}
{{- if and (eq $fleet.device "cpu") (gt (int .Values.pod.gpus) 0) }}
{{- fail (printf "pod.gpus is %v with fleet.device cpu, which uses no GPUs." .Values.pod.gpus) }}
{{- end -}}
{{- if ne .Values.gcsFaultTolerance.backend "none" }}
{{- fail "gcsFaultTolerance is for mode cluster: a single pod ends with its Ray." }}
{{- end -}}
{{- end -}}
{{- with .Values.gcsFaultTolerance }}
{{- if and (eq .backend "redis") (not .redis.host) }}{{ fail "gcsFaultTolerance.redis.host is empty." }}{{ end }}
{{- end -}}
{{- with .Values.gateway.autoscaling }}
{{- if and .enabled (gt (int .minReplicas) (int .maxReplicas)) }}
{{- fail "gateway.autoscaling.minReplicas is more than maxReplicas." }}
{{- end }}
{{- end -}}
{{- with $fleet.workerPorts }}
{{- if gt (int .first) (int .last) }}{{ fail "fleet.workerPorts.first is more than last." }}{{ end }}
{{- range $port := list (include "lorafleet.controllerPort" $) (include "lorafleet.rayAgentPort" $) }}
{{- if and (le (int $fleet.workerPorts.first) (int $port)) (ge (int $fleet.workerPorts.last) (int $port)) }}
{{- fail (printf "fleet.workerPorts must not include %s, which the controller or Ray uses." $port) }}
{{- end }}
{{- end }}
{{- end -}}
{{- if and .Values.serviceMonitor.enabled .Values.tenantsSecret (not .Values.serviceMonitor.apiKeySecret) }}
{{- fail "serviceMonitor.apiKeySecret is empty; with tenantsSecret, /metrics requires an API key." }}
{{- end -}}
{{- end -}}

{{/* Refuses a path on no volume, which would fail only when the fleet starts. */}}
{{- define "lorafleet.checkPath" -}}
{{- if hasPrefix "/" .path -}}
{{- $roots := list "/cache/" "/opt/lorafleet/examples/" -}}
{{- range $claim := list .root.Values.storage.model .root.Values.storage.adapters }}
{{- if $claim.claimName }}{{ $roots = append $roots (printf "%s/" (trimSuffix "/" $claim.mountPath)) }}{{ end }}
{{- end -}}
{{- $found := false -}}
{{- range $roots }}{{ if hasPrefix . (printf "%s/" $.path) }}{{ $found = true }}{{ end }}{{ end -}}
{{- if not $found }}
{{- fail (printf "%s is %s, which is on no volume: give storage.model or storage.adapters a claimName, or another path." .value .path) }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "lorafleet.checkGroups" -}}
{{- $fleet := .root.Values.fleet -}}
{{- $room := 0 -}}
{{- $names := list -}}
{{- range .root.Values.workerGroups }}
{{- $room = add $room (mul .replicas .ranksPerPod) }}
{{- if has .name $names }}{{ fail (printf "Two workerGroups are called %q." .name) }}{{ end }}
{{- $names = append $names .name }}
{{- end -}}
{{- if lt (int $room) (int .ranks) }}
{{- fail (printf "fleet.numWorkers %v of fleet.tensorParallelSize %v need %v ranks; workerGroups have room for %v (replicas times ranksPerPod). Lower one, or raise the other." $fleet.numWorkers $fleet.tensorParallelSize .ranks $room) }}
{{- end -}}
{{- end -}}
