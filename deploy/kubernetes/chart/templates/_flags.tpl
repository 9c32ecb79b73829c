{{/* A word of a flags file, quoted as for a shell. */}}
{{- define "lorafleet.word" -}}
{{- if regexMatch "^[A-Za-z0-9_./:=@%+,-]+$" . -}}{{ . }}{{- else -}}'{{ . | replace "'" "'\\''" }}'{{- end -}}
{{- end -}}

{{/* An adapter for --lora-modules: NAME=PATH, or JSON where it has more. */}}
{{- define "lorafleet.loraModule" -}}
{{- if or .baseModelName (hasKey . "weight") (hasKey . "pin") -}}
{{- $fields := dict "name" .name "path" .path -}}
{{- with .baseModelName }}{{ $_ := set $fields "base_model_name" . }}{{ end -}}
{{- if hasKey . "weight" }}{{ $_ := set $fields "weight" .weight }}{{ end -}}
{{- if hasKey . "pin" }}{{ $_ := set $fields "pin" .pin }}{{ end -}}
{{ include "lorafleet.word" ($fields | toJson) }}
{{- else -}}
{{ include "lorafleet.word" (printf "%s=%s" .name .path) }}
{{- end -}}
{{- end -}}

{{/* The flags file of `lorafleet up` and `lorafleet serve`. */}}
{{- define "lorafleet.flags" -}}
{{- $fleet := .Values.fleet -}}
{{ include "lorafleet.word" $fleet.model }}
{{- if $fleet.servedModelNames }}
--served-model-name{{ range $fleet.servedModelNames }} {{ include "lorafleet.word" . }}{{ end }}
{{- end }}
--device {{ $fleet.device }}
--num-workers {{ $fleet.numWorkers }}
--tensor-parallel-size {{ $fleet.tensorParallelSize }}
--drain-timeout-s {{ $fleet.drainTimeoutS }}
{{- if eq .Values.mode "cluster" }}
--worker-ports {{ $fleet.workerPorts.first }}-{{ $fleet.workerPorts.last }}
{{- end }}
{{- if $fleet.enableLora }}
--enable-lora
{{- end }}
{{- if $fleet.loraModules }}
--lora-modules
{{- range $fleet.loraModules }}
  {{ include "lorafleet.loraModule" . }}
{{- end }}
{{- end }}
{{- range $fleet.flags }}
{{ . }}
{{- end }}
{{- end -}}
